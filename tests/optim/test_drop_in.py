"""In the place of `torch.optim.SGD`: hooks of the step, state dicts, those of `torch.distributed.checkpoint`."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bdfast.optim import PAM, SAM, GradientNorm

BASES = {"sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), "adamw": (torch.optim.AdamW, {"lr": 0.01})}
METHODS = pytest.mark.parametrize("name", ["sam", "asam", "gsam", "gradient norm", "pam"])
EACH_BASE = pytest.mark.parametrize("base", BASES)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3))


def make(name: str, model: nn.Module, base: str = "sgd", **changes):
    optimizer, options = BASES[base]
    options = {**options, **changes}
    params = model.named_parameters()
    if name == "gradient norm":
        return GradientNorm(params, optimizer, rho=0.05, alpha=0.7, scope="tensor", **options)
    if name == "pam":
        return PAM(params, optimizer, reference=network(1).parameters(), rho=0.3, **options)
    gap = 0.3 if name == "gsam" else 0.0
    return SAM(params, optimizer, rho=0.05, adaptive=name == "asam", surrogate_gap=gap, **options)


def backward(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    x = torch.randn(8, 2, 4, 4, generator=generator).to(weight)
    loss = F.cross_entropy(model(x), torch.randint(3, (8,), generator=generator))
    loss.backward()
    return loss


def train(model: nn.Module, optimizer, steps: range = range(3)) -> None:
    for seed in steps:
        optimizer.zero_grad()
        if getattr(optimizer, "needs_gradient", False):
            backward(model, seed)
        optimizer.step(lambda seed=seed: backward(model, seed))


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


@EACH_BASE
@METHODS
def test_hooks_are_called_once_a_step(name, base):
    model = network()
    optimizer = make(name, model, base)
    calls = []
    for owner, who in ((optimizer, "own"), (optimizer.base_optimizer, "base")):
        owner.register_step_pre_hook(lambda *_, who=who: calls.append(f"before, {who}"))
        owner.register_step_post_hook(lambda *_, who=who: calls.append(f"after, {who}"))
    anywhere = [
        register_optimizer_step_pre_hook(lambda one, *_: calls.append(f"before any, {type(one)}")),
        register_optimizer_step_post_hook(lambda one, *_: calls.append(f"after any, {type(one)}")),
    ]
    kind = type(optimizer)
    once = [f"before any, {kind}", "before, own", "before, base", "after, own", "after, base", f"after any, {kind}"]
    try:
        backward(model, 0)
        optimizer.step(lambda: backward(model, 0))
        assert calls == once
        calls.clear()
        for last in (optimizer.second_step, optimizer.step):
            optimizer.first_step(zero_grad=True)
            assert not calls
            backward(model, 0)
            last()
            assert calls == once
            calls.clear()
    finally:
        for handle in anywhere:
            handle.remove()


def test_a_hook_before_the_step_may_change_the_gradients():
    model, expected = network(), network()

    def clip(optimizer, *_) -> None:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.01)

    for each, hooked in ((model, True), (expected, False)):
        optimizer = make("sam", each)
        if hooked:
            optimizer.register_step_pre_hook(clip)
        backward(each, 0)
        optimizer.first_step(zero_grad=True)
        backward(each, 0)
        if not hooked:
            clip(optimizer)
        optimizer.second_step()
    assert_same(model, expected)


@METHODS
def test_the_state_has_parameters_for_keys(name):
    model = network()
    optimizer = make(name, model)
    train(model, optimizer)
    assert set(optimizer.state) <= set(model.parameters())
    assert set(optimizer.state_dict()["state"]) <= set(range(4))
    plain = make(name, model, momentum=0.0)
    train(model, plain)
    assert not plain.state  # as with SGD


def test_a_scaler_that_could_not_step_is_not_remembered():
    model, expected = network(), network()
    optimizer, other = make("gradient norm", model), make("gradient norm", expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    backward(model, 0)
    optimizer.first_step(scaled=True)
    scaler.scale(torch.ones(()))  # makes it ready
    backward(model, 0)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="still scaled"):
        scaler.step(optimizer)
    for each, one in ((model, optimizer), (expected, other)):
        train(each, one)
    assert_same(model, expected)


CHECKPOINTS = pytest.mark.parametrize(
    ("base", "changes", "options"),
    [
        (base, changes, options)
        for base, changes in (("sgd", {}), ("sgd", {"momentum": 0.0}), ("adamw", {}))
        for options in ({}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True})
        # torch makes no full state dict of a state without a tensor.
        if not (changes and "full_state_dict" in options)
    ],
)


@CHECKPOINTS
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@METHODS
def test_distributed_state_dicts_take_a_run_up(name, base, changes, options, used):
    options = StateDictOptions(**options)
    model = network()
    optimizer = make(name, model, base, **changes)
    train(model, optimizer)
    optimizer.zero_grad()
    undisturbed = copy.deepcopy((model, optimizer))
    stored = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed = copy.deepcopy(model)
    taken_up = make(name, resumed, base, **changes)
    if used:
        other = network(5)
        for parameter, x in zip(resumed.parameters(), other.parameters(), strict=True):
            parameter.data.copy_(x)
        train(resumed, taken_up)
        resumed.load_state_dict(model.state_dict())
        taken_up.zero_grad()
    set_optimizer_state_dict(resumed, taken_up, stored, options=options)
    for one in ((model, optimizer), (resumed, taken_up), undisturbed):
        train(*one, range(3, 6))
    assert_same(model, undisturbed[0])
    assert_same(resumed, undisturbed[0])


@EACH_BASE
@METHODS
def test_a_distributed_state_dict_of_a_fresh_optimizer_is_that_of_its_base(name, base):
    model, expected = network(), network()
    optimizer, options = BASES[base]
    _, ours = get_state_dict(model, make(name, model, base))
    _, theirs = get_state_dict(expected, optimizer(expected.parameters(), **options))
    assert_same(model, expected)
    assert set(ours["state"]) == set(theirs["state"])
    for key, held in theirs["state"].items():
        assert set(held) == set(ours["state"][key])
        assert all(torch.equal(held[x], ours["state"][key][x]) for x in held)


def test_a_step_without_a_first_one_is_refused_where_it_has_a_length():
    model = network()
    optimizer = make("sam", model)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="expected first_step"):
        optimizer.step()
    train(model, optimizer)
    backward(model, 0)
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(RuntimeError, match="expected first_step"):
        optimizer.step()


@EACH_BASE
@METHODS
def test_either_optimizer_can_be_given_a_state(name, base):
    """Code for the common SAM class loads into its base; other code begins anew with an empty state."""
    model = network()
    optimizer = make(name, model, base)
    train(model, optimizer)
    weights = copy.deepcopy(model.state_dict())
    stored = [copy.deepcopy(one.state_dict()) for one in (optimizer, optimizer.base_optimizer)]
    train(model, optimizer, range(3, 5))
    for index in range(2):
        other = network(2)
        taken_up = make(name, other, base)
        train(other, taken_up)
        (taken_up, taken_up.base_optimizer)[index].load_state_dict(stored[index])
        other.load_state_dict(weights)
        train(other, taken_up, range(3, 5))
        assert_same(other, model)
    empty, fresh = copy.deepcopy((model, optimizer))
    expected = copy.deepcopy(empty)
    fresh.state = type(fresh.state)(dict)
    for each, one in ((empty, fresh), (expected, make(name, expected, base))):
        train(each, one, range(2))
    for a, b in zip(empty.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@METHODS
def test_the_state_of_the_base_alone_is_taken_up(name):
    """A run that SGD began; its state dict has no rho."""
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    backward(model, 0)
    plain.step()
    optimizer = make(name, model)
    rho = optimizer.param_groups[0]["rho"]
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert optimizer.param_groups[0]["rho"] == rho
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    assert momentum.any()
    train(model, optimizer)
    plain.load_state_dict(optimizer.state_dict())
