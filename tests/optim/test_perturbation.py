import pytest
import torch
from torch import nn

from bdfast.ops.finite import check_finite_gradients
from bdfast.optim import perturbed


def quadratic(*values: float):
    """Parameters w and the loss 1/2 ||A w||^2 with known gradients."""
    params = [nn.Parameter(torch.tensor([value, -value], dtype=torch.float64)) for value in values]
    return params, lambda: sum((index + 1) * (parameter**2).sum() / 2 for index, parameter in enumerate(params))


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("mode", ["sam", "asam", "path"])
def test_moves_by_rho_and_comes_back(mode, scope):
    params, loss = quadratic(0.3, 0.7)
    loss().backward()
    before = [parameter.detach().clone() for parameter in params]
    reference = [start + index + 1 for index, start in enumerate(before)]
    directions, lengths = [], []
    for parameter, start, end in zip(params, before, reference, strict=True):
        direction = {"sam": parameter.grad, "asam": parameter.grad * start**2, "path": end - start}[mode]
        directions.append(direction)
        lengths.append((parameter.grad * start if mode == "asam" else direction).norm())
    norms = torch.stack(lengths).norm().expand(2) if scope == "global" else torch.stack(lengths)
    options = {"reference": reference} if mode == "path" else {}
    with perturbed(params, rho=0.1, mode=mode, scope=scope, **options) as norm:
        for parameter, start, direction, length in zip(params, before, directions, norms, strict=True):
            torch.testing.assert_close(parameter.detach(), start + 0.1 * direction / length)
        torch.testing.assert_close(norm, (norms[0] if scope == "global" else norms).float())
    assert all(torch.equal(parameter, start) for parameter, start in zip(params, before, strict=True))


def test_comes_back_after_an_error():
    params, loss = quadratic(0.1)
    loss().backward()
    before = params[0].detach().clone()

    def halt():
        assert not torch.equal(params[0], before)
        raise RuntimeError("halt")

    with pytest.raises(RuntimeError, match="halt"), perturbed(params, rho=1.0):
        halt()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_zero_and_missing_gradients_move_nothing(scope):
    still, missing, moving = (nn.Parameter(torch.ones(2)) for _ in range(3))
    still.grad, moving.grad = torch.zeros(2), torch.ones(2)
    with perturbed([still, missing, moving], rho=0.5, scope=scope):
        assert torch.equal(still, torch.ones(2))
        assert torch.equal(missing, torch.ones(2))
        assert not torch.equal(moving, torch.ones(2))
    with perturbed([missing], rho=0.5, scope=scope):
        assert torch.equal(missing, torch.ones(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_moves_nothing(value):
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, value, 1.0])
    with perturbed([parameter], rho=0.5) as norm:
        assert not norm.isfinite()
        assert torch.equal(parameter, torch.ones(3))


def test_other_layouts_and_no_dimension():
    """Gradients with other strides than the weights, a weight without a dimension, channels-last."""
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    weight.grad = torch.randn(4, 3, 2, 2)
    temperature = nn.Parameter(torch.tensor(2.0))
    temperature.grad = torch.tensor(-3.0)
    before = weight.detach().clone(), temperature.detach().clone()
    with perturbed([weight, temperature], rho=0.5):
        norm = (weight.grad.square().sum() + 9).sqrt()
        torch.testing.assert_close(weight.detach(), before[0] + 0.5 * weight.grad / norm)
        torch.testing.assert_close(temperature.detach(), before[1] - 1.5 / norm)
    assert torch.equal(weight, before[0])
    assert torch.equal(temperature, before[1])


@pytest.mark.parametrize(("mode", "reference"), [("path", None), ("sam", [torch.ones(2)])])
def test_a_reference_belongs_to_a_path(mode, reference):
    there = perturbed([nn.Parameter(torch.ones(2))], rho=1.0, mode=mode, reference=reference)
    with pytest.raises(ValueError, match="reference: expected the weights to move towards with mode 'path'"):
        there.__enter__()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_named(value):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    check_finite_gradients(model.named_parameters())
    model[0].weight.grad[0, 1] = 1e30  # its square overflows, it does not
    check_finite_gradients(model.named_parameters())
    model[1].weight.grad[0, 1] = value
    with pytest.raises(FloatingPointError, match=r"1.weight: expected a finite gradient, got NaN or infinity"):
        check_finite_gradients(model.named_parameters())
    check_finite_gradients(nn.Linear(1, 1).named_parameters())
