"""Parameters that change their dtype, layout or memory between steps, and those that are views of others."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdfast.ops.lists import laid_out_like
from bdfast.optim import PAM, SAM, GradientNorm

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
METHODS = pytest.mark.parametrize("name", ["sam", "asam", "gsam", "gradient norm", "pam"])


def make(name: str, params, reference=None, base=torch.optim.SGD, **options):
    params = list(params)
    if name == "gradient norm":
        return GradientNorm(params, base, rho=0.1, alpha=0.7, **options)
    if name == "pam":
        reference = [param.detach() + 0.1 for param in params] if reference is None else reference
        return PAM(params, base, reference=reference, rho=0.3, **options)
    gap = 0.3 if name == "gsam" else 0.0
    return SAM(params, base, rho=0.1, adaptive=name == "asam", surrogate_gap=gap, **options)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    model.temperature = nn.Parameter(torch.tensor(0.7))
    return model


def backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 3, 4, 4, generator=generator).to(model.temperature)
    F.cross_entropy(model(x) * model.temperature, torch.randint(3, (8,), generator=generator)).backward()


def take(optimizer, backward) -> None:
    optimizer.zero_grad()
    if optimizer.needs_gradient:
        backward()
    optimizer.first_step(zero_grad=True)
    backward()
    optimizer.second_step(zero_grad=True)


CHANGES = {
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "new memory": lambda model: [setattr(x, "data", x.data.clone()) for x in model.parameters()],
    "one flat vector": lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters()
    ),
    "shared memory": lambda model: model.share_memory(),
    "there and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
@METHODS
def test_a_model_that_is_converted_between_steps(name, change):
    """Like one that was so from the beginning, with the same momentum."""
    model = network()
    optimizer = make(name, model.parameters(), **SGD)
    for seed in range(2):
        take(optimizer, partial(backward, model, seed))
    CHANGES[change](model)
    expected = copy.deepcopy(model)
    start = [param.detach().clone() for param in network().parameters()]
    fresh = make(name, expected.parameters(), [x + 0.1 for x in start], **SGD)
    for param, other in zip(model.parameters(), expected.parameters(), strict=True):
        held = optimizer.state[param]["momentum_buffer"]
        fresh.state[other]["momentum_buffer"] = torch.empty_like(other).copy_(held).detach()
    for seed in range(2, 4):
        for one, each in ((optimizer, model), (fresh, expected)):
            take(one, partial(backward, each, seed))
    for param, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
        assert param.stride() == other.stride()
        assert optimizer.state[param]["momentum_buffer"].dtype == param.dtype


@METHODS
def test_a_model_that_is_converted_between_the_halves(name):
    model = network()
    optimizer = make(name, model.parameters(), **SGD)
    take(optimizer, partial(backward, model, 0))
    expected, fresh = copy.deepcopy((model, optimizer))
    for each, one, change in ((model, optimizer, CHANGES["channels last"]), (expected, fresh, lambda model: None)):
        backward(each, 1)
        one.first_step(zero_grad=True)
        change(each)
        backward(each, 1)
        one.second_step(zero_grad=True)
    for param, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
    before = [param.detach().clone() for param in model.parameters()]
    backward(model, 2)
    optimizer.first_step(zero_grad=True)
    model.double()
    optimizer.restore()
    for param, x in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, x.double())


@METHODS
def test_a_parameter_that_changes_its_shape_needs_new_momentum(name):
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2))]
    optimizer = make(name, params, **SGD)

    def backward() -> None:
        sum((param**2).sum() for param in params).backward()

    take(optimizer, backward)
    params[0].data, params[0].grad = params[0].data[:2].clone(), None
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=r"expected (the )?shape .*\[2, 3\].*, got \[4, 3\]"):
        take(optimizer, backward)
    assert all(map(torch.equal, params, before))
    if name != "pam":  # whose reference has the old shape
        del optimizer.state[params[0]]
        take(optimizer, backward)
        assert not torch.equal(params[0], before[0])


def test_other_devices_are_laid_out_for():
    """As far as that can be seen without one: the copy goes to the device of the parameter."""
    x, like = torch.ones(4, 3), torch.empty(3, 4, device="meta").t()
    moved = laid_out_like(x, like)
    assert moved.device.type == "meta"
    assert moved.stride() == like.stride()


def views() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    return {
        "every second column": draw(4, 8)[:, ::2],
        "slice of a larger weight": draw(6, 8)[1:5, :4],
        "transposed": draw(4, 6).t(),
        "middle of a convolution": draw(4, 6, 3, 3)[:, 1:5, :2],
        "every third row of a vector": draw(12)[::3],
        "permuted": draw(3, 4, 5).permute(2, 0, 1),
        "one row of many": draw(5, 6)[2:3, ::3],
    }


def transcribed(name: str, w: torch.Tensor, steps: int) -> torch.Tensor:
    """The step for the loss sum(w^4) / 4, whose gradient is w^3, in plain arithmetic."""
    momentum, reference = None, w + 0.1
    for _ in range(steps):
        first = w**3
        direction = {"asam": w**2 * first, "pam": reference - w}.get(name, first)
        norm = {"asam": (w * first).norm(), "pam": direction.norm()}.get(name, first.norm())
        second = (w + (0.3 if name == "pam" else 0.1) * direction / norm) ** 3
        if name == "gradient norm":
            second = 0.3 * first + 0.7 * second
        if name == "gsam":
            second = second - 0.3 * (first - (first * second).sum() / (second * second).sum() * second)
        step = second + SGD["weight_decay"] * w
        momentum = step if momentum is None else SGD["momentum"] * momentum + step
        w = w - SGD["lr"] * momentum
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("base", ["fused", "foreach"])
@pytest.mark.parametrize("view", views())
@METHODS
def test_a_view_moves_like_a_weight_of_its_own(name, view, base, dtype):
    """torch.optim.SGD takes them; what lies in between keeps its values."""
    values = views()[view]
    whole = torch.full((values.untyped_storage().nbytes() // 8,), 7.0, dtype=dtype)
    param = nn.Parameter(torch.as_strided(whole, values.shape, values.stride(), values.storage_offset()))
    with torch.no_grad():
        param.copy_(values)
    outside = torch.ones_like(whole, dtype=torch.bool)
    torch.as_strided(outside, values.shape, values.stride(), values.storage_offset()).fill_(False)
    start = param.detach().clone()

    class Plain(torch.optim.SGD):
        """Not fused with ours."""

    optimizer = make(name, [param], base=torch.optim.SGD if base == "fused" else Plain, **SGD)
    for _ in range(3):
        take(optimizer, lambda: ((param**4).sum() / 4).backward())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(param.double(), transcribed(name, start.double(), 3), rtol=tolerance, atol=tolerance)
    assert bool((whole[outside] == 7).all())
    assert param.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("groups", ["one", "each"])
@METHODS
def test_memory_that_is_reached_twice_is_refused(name, groups):
    """Also by parameters of different groups, which the ops get in different calls."""
    wide = torch.randn(4, 6)
    for params in (
        [nn.Parameter(torch.ones(1, 3).expand(2, 3))],
        [nn.Parameter(torch.ones(3, 1).expand(3, 4)), nn.Parameter(torch.ones(2))],
        [nn.Parameter(wide), nn.Parameter(wide.t())],
        [nn.Parameter(wide[:, ::2]), nn.Parameter(wide[:, ::3])],
    ):
        before = [param.detach().clone() for param in params]
        split = [{"params": [x], "rho": 0.1 + i} for i, x in enumerate(params)] if groups == "each" else params
        optimizer = make(name, split, [x + 0.1 for x in before], **SGD)
        with pytest.raises(ValueError, match=r"expected (memory of its own|every parameter once)"):
            take(optimizer, lambda params=params: sum((x**2).sum() for x in params).backward())
        assert all(map(torch.equal, params, before))
        assert not optimizer.state
