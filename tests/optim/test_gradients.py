"""Gradients that are zero, missing or not finite; frozen and unused parameters; errors in the middle of a step."""

from functools import partial

import pytest
import torch
from torch import nn

from bdfast.optim import PAM, SAM, GradientNorm

SGD = {"lr": 0.1, "momentum": 0.9}


class Net(nn.Module):
    """A used layer, one that is frozen, one that no pass reaches, and one that only a call of `second` uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.frozen, self.unused, self.second = (nn.Linear(3, 3, bias=False) for _ in range(4))
        self.frozen.requires_grad_(False)

    def loss(self, second: bool = False) -> torch.Tensor:
        x = self.frozen(self.used(torch.ones(2, 3)))
        return (self.second(x) if second else x).square().sum()


def make(name: str, model: nn.Module, **options):
    options = {**SGD, **options}
    params = [(key, parameter) for key, parameter in model.named_parameters()]
    if name == "tsbd":
        return GradientNorm(params, torch.optim.SGD, rho=0.05, alpha=0.7, scope="tensor", **options)
    if name == "pam":
        reference = [parameter.detach() + 0.1 for parameter in model.parameters()]
        return PAM(params, torch.optim.SGD, reference=reference, rho=0.05, **options)
    return SAM(params, torch.optim.SGD, rho=0.05, adaptive=name == "asam", **options)


METHODS = pytest.mark.parametrize("name", ["sam", "asam", "tsbd", "pam"])


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor], *names: str) -> None:
    for name, value in model.state_dict().items():
        if not names or name.split(".")[0] in names:
            assert torch.equal(value, before[name]), name


@METHODS
def test_frozen_and_unused_parameters_never_move(name):
    """The published PAM moves them towards the backdoor in every step."""
    model = Net()
    optimizer = make(name, model)
    before = state(model)
    for _ in range(3):
        optimizer.zero_grad()
        if optimizer.needs_gradient:
            model.loss().backward()
        optimizer.step(lambda: model.loss().backward())
    assert_same(model, before, "frozen", "unused", "second")
    assert not torch.equal(model.used.weight, before["used.weight"])
    assert model.unused.weight not in optimizer.state or not optimizer.state[model.unused.weight]


@METHODS
def test_zero_gradients_move_nothing(name):
    model = Net()
    optimizer = make(name, model)
    before = state(model)

    def zeros() -> None:
        model.used.weight.grad = torch.zeros_like(model.used.weight)

    zeros()
    optimizer.step(zeros)
    assert_same(model, before)


@METHODS
def test_a_vanished_layer_does_not_poison_the_others(name):
    """Zeroed neurons make gradients of whole tensors zero; the published code then divides by zero."""
    model = Net()
    optimizer = make(name, model)

    def gradients() -> None:
        model.used.weight.grad = torch.zeros_like(model.used.weight)
        model.second.weight.grad = torch.ones_like(model.second.weight)

    before = state(model)
    gradients()
    optimizer.step(gradients)
    assert_same(model, before, "used")
    assert model.second.weight.isfinite().all()
    assert not torch.equal(model.second.weight, before["second.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", ["first", "second"])
@METHODS
def test_a_gradient_that_is_not_finite_stops_the_step(name, at, value):
    model = Net()
    optimizer = make(name, model)
    model.used.weight.grad = torch.ones_like(model.used.weight)
    optimizer.step(lambda: model.loss().backward())  # momentum is there
    before, momentum = state(model), optimizer.state[model.used.weight]["momentum_buffer"].clone()

    def gradients(which: str) -> None:
        model.used.weight.grad = torch.ones_like(model.used.weight)
        model.second.weight.grad = torch.ones_like(model.second.weight)
        if which == at or name == "pam":  # which makes one pass
            model.second.weight.grad[1, 2] = value

    gradients("first")
    with pytest.raises(
        FloatingPointError, match=r"second.weight: expected a finite gradient, got NaN or infinity; the"
    ):
        optimizer.step(partial(gradients, "second"))
    assert_same(model, before)
    assert torch.equal(optimizer.state[model.used.weight]["momentum_buffer"], momentum)
    model.second.weight.grad = None  # and it goes on
    optimizer.step(lambda: model.loss().backward())
    assert not torch.equal(model.used.weight, before["used.weight"])


def test_weights_that_are_not_finite_are_named():
    model = Net()
    optimizer = make("pam", model)
    with torch.no_grad():
        model.unused.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"unused.weight: expected a finite weight"):
        optimizer.first_step()


def test_parameters_without_names_are_named_by_their_place():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = SAM([{"params": [nn.Parameter(torch.ones(1)), parameter]}], torch.optim.SGD, lr=0.1)
    parameter.grad = torch.tensor([1.0, float("nan")])
    with pytest.raises(FloatingPointError, match=r"param_groups\[0\]\['params'\]\[1\]: expected a finite gradient"):
        optimizer.first_step()


@METHODS
def test_a_parameter_that_only_one_of_the_passes_uses(name):
    for first, second in ((False, True), (True, False)):
        model = Net()
        optimizer = make(name, model)
        before = state(model)
        model.loss(first).backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        optimizer.step(lambda model=model, second=second: model.loss(second).backward())
        alone = model.second.weight
        if first and name == "tsbd":  # the second gradient counts as zero
            step = -0.1 * 0.3 * gradients["second.weight"]
            torch.testing.assert_close(alone.detach() - before["second.weight"], step)
        elif first or (second and name == "tsbd"):
            assert torch.equal(alone, before["second.weight"]) == first
        assert not torch.equal(model.used.weight, before["used.weight"])


@METHODS
def test_weights_come_back_when_the_closure_fails(name):
    model = Net()
    optimizer = make(name, model)
    before = state(model)
    model.loss().backward()

    def fails() -> None:
        assert not torch.equal(model.used.weight, before["used.weight"])
        raise RuntimeError("halt")

    with pytest.raises(RuntimeError, match="halt"):
        optimizer.step(fails)
    assert_same(model, before)


@METHODS
def test_a_second_step_needs_a_first(name):
    model = Net()
    optimizer = make(name, model)
    with pytest.raises(RuntimeError, match=r"expected first_step\(\) before this step, got none"):
        optimizer.second_step()
    model.loss().backward()
    optimizer.first_step(zero_grad=True)
    optimizer.restore()
    with pytest.raises(RuntimeError, match=r"expected first_step\(\) before this step"):
        optimizer.step()


def test_a_forgotten_backward_is_told():
    with pytest.raises(
        RuntimeError, match=r"SAM: expected gradients to step along, got none in any parameter; call loss"
    ):
        make("sam", Net()).first_step()


def test_a_first_step_that_was_left_is_taken_back_by_the_next():
    model = Net()
    optimizer = make("sam", model)
    before = state(model)
    for _ in range(2):
        model.zero_grad()
        model.loss().backward()
        optimizer.first_step()
    optimizer.restore()
    assert_same(model, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: SAM(p, torch.optim.SGD, rho=-1, lr=0.1), r"rho: expected a radius >= 0, got -1"),
        (lambda p: GradientNorm(p, torch.optim.SGD, alpha=2, lr=0.1), r"alpha: expected a share in \[0, 1\], got 2"),
        (lambda p: PAM(p, torch.optim.SGD, reference=[], lr=0.1), r"reference: expected 1 tensors with the shapes"),
        (lambda p: PAM(p, torch.optim.SGD, reference=p, lr=0.1), r"reference\[0\]: expected memory of its own"),
    ],
)
def test_wrong_options(call, message):
    with pytest.raises(ValueError, match=message):
        call([nn.Parameter(torch.ones(2, 2))])
