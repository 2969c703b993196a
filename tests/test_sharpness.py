import pytest
import torch
from torch import nn

from bdfast.sharpness import check_finite_gradients, gradient_norm_gradients, perturbed


def quadratic(*values: float):
    """Parameters w and the loss 1/2 ||A w||^2 with known gradients."""
    params = [nn.Parameter(torch.tensor([value, -value], dtype=torch.float64)) for value in values]
    return params, lambda: sum((index + 1) * (parameter**2).sum() / 2 for index, parameter in enumerate(params))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_perturbed_moves_by_rho_and_comes_back(scope):
    params, loss = quadratic(0.3, 0.7)
    loss().backward()
    before = [parameter.detach().clone() for parameter in params]
    gradients = [parameter.grad.clone() for parameter in params]
    with perturbed(params, rho=0.1, scope=scope) as norm:
        moved = [parameter.detach() - start for parameter, start in zip(params, before, strict=True)]
        lengths = torch.stack([step.norm() for step in moved])
        expected = torch.stack([gradient.norm() for gradient in gradients])
        if scope == "global":
            torch.testing.assert_close(lengths.norm(), torch.tensor(0.1, dtype=torch.float64))
            torch.testing.assert_close(norm, expected.norm())
        else:
            torch.testing.assert_close(lengths, torch.full((2,), 0.1, dtype=torch.float64))
            torch.testing.assert_close(norm, expected)
    assert all(torch.equal(parameter, start) for parameter, start in zip(params, before, strict=True))


def test_perturbed_restores_after_an_error():
    params, loss = quadratic(0.1)
    loss().backward()
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="halt"), perturbed(params, rho=1.0):
        raise RuntimeError("halt")
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


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_gradient_norm_gradients_are_the_published_mixture(scope):
    """Against the loop of the paper's stage 2: a copy of the model a step, per-tensor lists, mixed gradients."""
    params, loss = quadratic(0.3, 0.7, 0.0)
    rho, alpha = 0.05, 0.7
    loss().backward()
    first = [parameter.grad.clone() for parameter in params]
    total = torch.cat(first).norm()
    expected = []
    for index, (parameter, gradient) in enumerate(zip(params, first, strict=True)):
        norm = total if scope == "global" else gradient.norm()
        neighbour = parameter.detach() + (rho * gradient / norm if norm > 0 else 0)
        expected.append((1 - alpha) * gradient + alpha * (index + 1) * neighbour)
    gradient_norm_gradients(params, loss, rho=rho, alpha=alpha, scope=scope)
    for parameter, value in zip(params, expected, strict=True):
        torch.testing.assert_close(parameter.grad, value)


def test_gradient_norm_gradients_penalise_the_norm():
    """The mixture is the gradient of L + alpha rho ||grad L||, up to the finite difference."""
    params, loss = quadratic(0.4, 0.9)
    rho, alpha = 1e-5, 0.7
    gradients = torch.autograd.grad(loss(), params, create_graph=True)
    objective = loss() + alpha * rho * torch.cat(gradients).norm()
    exact = torch.autograd.grad(objective, params)
    loss().backward()
    gradient_norm_gradients(params, loss, rho=rho, alpha=alpha)
    for parameter, value in zip(params, exact, strict=True):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-9, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_named(value):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    check_finite_gradients(model.named_parameters())
    model[1].weight.grad[0, 1] = value
    with pytest.raises(FloatingPointError, match=r"1.weight: expected a finite gradient, got NaN or infinity"):
        check_finite_gradients(model.named_parameters())
    check_finite_gradients(nn.Linear(1, 1).named_parameters())
