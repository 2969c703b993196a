"""Copies and pickles of the optimizers, and groups that are added to them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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


def through_pickle(x):
    return pickle.loads(pickle.dumps(x))


def through_save(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


AGAIN = pytest.mark.parametrize("again", [copy.deepcopy, through_pickle, through_save])


@AGAIN
@EACH_BASE
@METHODS
def test_a_copy_goes_on_like_the_original_and_apart_from_it(name, base, again):
    model = network()
    optimizer = make(name, model, base)
    train(model, optimizer)
    other, twin = again((model, optimizer))
    train(model, optimizer, range(3, 6))
    changed = copy.deepcopy(other)
    train(other, twin, range(3, 6))
    assert_same(other, model)
    assert not torch.equal(other[0].weight, changed[0].weight)
    assert twin.base_optimizer.state is twin.state
    assert twin.base_optimizer.param_groups is twin.param_groups


@AGAIN
@METHODS
def test_a_copy_between_the_halves_can_be_restored(name, again):
    model = network()
    optimizer = make(name, model)
    train(model, optimizer)
    start = copy.deepcopy(model)
    backward(model, 3)
    optimizer.first_step(zero_grad=True)
    other, twin = again((model, optimizer))
    back, undone = again((model, optimizer))
    undone.restore()
    assert_same(back, start)
    for each, one in ((model, optimizer), (other, twin)):
        backward(each, 3)
        one.second_step(zero_grad=True)
    assert_same(other, model)


def test_a_copy_leaves_schedules_and_hooks_to_the_original():
    model = network()
    optimizer = make("sam", model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    train(model, optimizer)
    schedule.step()
    other, twin = copy.deepcopy((model, optimizer))
    calls.clear()
    train(other, twin)
    assert not calls
    assert "step" not in vars(twin)
    assert twin.param_groups[0]["lr"] == 0.05
    twin.register_step_post_hook(lambda *_: calls.append("its own"))
    train(other, twin, range(1))
    assert calls == ["its own"]


@EACH_BASE
@METHODS
def test_a_group_that_is_added_moves_like_one_that_was_there(name, base):
    results = []
    for late in (False, True):
        model = network()
        optimizer, options = BASES[base]
        reference = list(network(1).parameters())
        groups = [
            {"params": list(model[0].parameters())},
            {"params": list(model[3].parameters()), "lr": 0.03, "rho": 0.2},
        ]
        first = groups[:1] if late else groups
        if name == "pam":
            start = reference[:2] if late else reference
            one = PAM(first, optimizer, reference=start, rho=0.3, **options)
            groups[1] |= {"reference": reference[2:]} if late else {}
        elif name == "gradient norm":
            one = GradientNorm(first, optimizer, rho=0.1, **options)
        else:
            gap = 0.3 if name == "gsam" else 0.0
            one = SAM(first, optimizer, rho=0.1, adaptive=name == "asam", surrogate_gap=gap, **options)
        if late:
            one.add_param_group(groups[1])
        train(model, one)
        results.append(model)
    assert_same(*results)


def test_a_group_that_is_added_later_has_its_weights_for_reference():
    """A layer that is unfrozen: common code adds its group without a reference."""
    model = network()
    optimizer = PAM(model[0].parameters(), torch.optim.SGD, reference=list(network(1)[0].parameters()), rho=0.3, lr=0.1)
    train(model, optimizer)
    start = [parameter.detach().clone() for parameter in model[3].parameters()]
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.01})
    train(model, optimizer, range(3, 5))
    ends = [parameter.detach().clone() for parameter in model.parameters()]
    references = [*network(1)[0].parameters(), *start]
    length = torch.stack([(x - end).norm() for x, end in zip(references, ends, strict=True)]).norm()
    optimizer.first_step()
    for parameter, x, end in zip(model.parameters(), references, ends, strict=True):
        torch.testing.assert_close(parameter, end + 0.3 * (x - end) / length)
    assert not any("reference" in group for group in optimizer.param_groups)


def test_a_wrong_group_is_refused_and_changes_nothing():
    model = network()
    optimizer = make("pam", model)
    extra = nn.Parameter(torch.ones(3))
    for group, message in (
        ({"params": [("extra", extra)], "rho": -1.0}, "rho: expected a radius >= 0, got -1"),
        ({"params": [("extra", extra)], "reference": [torch.ones(2)]}, "reference: expected 1 tensors with the shapes"),
        ({"params": [("extra", extra)], "reference": [extra]}, r"reference\[0\]: expected memory of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    train(model, optimizer)
    assert extra.tolist() == [1, 1, 1]
