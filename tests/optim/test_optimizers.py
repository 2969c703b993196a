"""SAM, GradientNorm and PAM against plain transcriptions of what was published."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdfast.optim import PAM, SAM, GradientNorm

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
EPS = 1e-12


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(seed: int = 0, count: int = 32):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 4, dtype=torch.float64, generator=generator),
        torch.randint(3, (count,), generator=generator),
    )


def backward(model: nn.Module, seed: int = 0) -> torch.Tensor:
    x, y = data(seed)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(model: nn.Module, optimizer, steps: int, first: int = 0) -> None:
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        if optimizer.needs_gradient:
            backward(model, seed)
        optimizer.step(partial(backward, model, seed))


def common_sam(model, steps, *, rho, adaptive=False, gap=0.0, base=torch.optim.SGD, **options) -> None:
    """The class that most SAM code copies, with GSAM's decomposition as FT-SAM has it."""
    optimizer = base(model.parameters(), **options)
    params = list(model.parameters())
    for seed in range(steps):
        optimizer.zero_grad()
        backward(model, seed)
        first = [p.grad.clone() for p in params]
        with torch.no_grad():
            norm = torch.stack([((p.abs() if adaptive else 1.0) * p.grad).norm() for p in params]).norm()
            old = [p.clone() for p in params]
            for p in params:
                p.add_((p**2 if adaptive else 1.0) * p.grad * rho / (norm + EPS))
        optimizer.zero_grad()
        backward(model, seed)
        with torch.no_grad():
            inner = sum((a * p.grad).sum() for a, p in zip(first, params, strict=True))
            norm1 = torch.stack([a.norm() for a in first]).norm()
            norm2 = torch.stack([p.grad.norm() for p in params]).norm()
            cosine = inner / (norm1 * norm2 + EPS)
            for p, o, a in zip(params, old, first, strict=True):
                p.grad -= gap * (a - cosine * norm1 * p.grad / (norm2 + EPS))
                p.copy_(o)
        optimizer.step()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("gap", [0.0, 0.3])
@pytest.mark.parametrize(
    ("base", "options"),
    [
        (torch.optim.SGD, SGD),
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.5, "maximize": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
        (torch.optim.AdamW, {"lr": 0.01}),
    ],
    ids=["sgd", "plain", "dampened", "nesterov", "adamw"],
)
def test_sam_is_the_common_class(base, options, gap, adaptive):
    model, expected = network(), network()
    common_sam(expected, 10, rho=0.1, adaptive=adaptive, gap=gap, base=base, **options)
    train(model, SAM(model.parameters(), base, rho=0.1, adaptive=adaptive, surrogate_gap=gap, **options), 10)
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_gradient_norm_is_the_published_loop(base, scope):
    """Stage 2 of TSBD: a copy of the model a step, gradients kept in lists, mixed and put back."""
    model, expected = network(), network()
    rho, alpha = 0.05, 0.7
    options = SGD if base is torch.optim.SGD else {"lr": 0.01}
    optimizer = base(expected.parameters(), **options)
    for seed in range(10):
        optimizer.zero_grad()
        backward(expected, seed)
        first = [p.grad.clone() for p in expected.parameters()]
        neighbour = copy.deepcopy(expected)
        total = torch.stack([g.norm() for g in first]).norm()
        with torch.no_grad():
            for p, g in zip(neighbour.parameters(), first, strict=True):
                p.add_(rho * g / ((total if scope == "global" else g.norm()) + EPS))
        neighbour.zero_grad()
        backward(neighbour, seed)
        for p, q, g in zip(expected.parameters(), neighbour.parameters(), first, strict=True):
            p.grad = (1 - alpha) * g + alpha * q.grad
        optimizer.step()
    train(model, GradientNorm(model.parameters(), base, rho=rho, alpha=alpha, scope=scope, **options), 10)
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-6, atol=1e-8)


def test_gradient_norm_penalises_the_norm():
    """The mixture is the gradient of L + alpha rho ||grad L||, up to the finite difference."""
    model = network()
    rho, alpha = 1e-5, 0.7
    x, y = data()
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()), create_graph=True)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    exact = torch.autograd.grad(F.cross_entropy(model(x), y) + alpha * rho * norm, list(model.parameters()))
    before = weights(model)
    train(model, GradientNorm(model.parameters(), torch.optim.SGD, rho=rho, alpha=alpha, lr=1.0), 1)
    torch.testing.assert_close(before - weights(model), torch.cat([g.flatten() for g in exact]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_pam_is_the_published_step(base):
    backdoored, model, expected = network(), network(), network()
    options = SGD if base is torch.optim.SGD else {"lr": 0.01}
    optimizer = base(expected.parameters(), **options)
    for seed in range(10):
        optimizer.zero_grad()
        old = copy.deepcopy(expected.state_dict())
        with torch.no_grad():
            pairs = list(zip(expected.parameters(), backdoored.parameters(), strict=True))
            norm = torch.stack([(b - p).norm() for p, b in pairs]).norm()
            for p, b in pairs:
                p.add_(0.2 * (b - p) / (norm + EPS))
        backward(expected, seed)
        expected.load_state_dict(old)
        optimizer.step()
    train(model, PAM(model.parameters(), base, reference=backdoored.parameters(), rho=0.2, **options), 10)
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-6, atol=1e-8)


def test_pam_sees_that_the_weights_were_changed_in_between():
    """The distance carried from step to step would be that of other weights."""
    results = []
    for fresh in (False, True):
        model, backdoored = network(), network()
        make = partial(PAM, reference=list(backdoored.parameters()), rho=0.2, lr=0.1)
        optimizer = make(model.parameters(), torch.optim.SGD)
        train(model, optimizer, 2)
        with torch.no_grad():
            model[0].weight.mul_(1.5)
        train(model, make(model.parameters(), torch.optim.SGD) if fresh else optimizer, 1, first=2)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


MAKERS = {
    "sam": lambda params, reference, **options: SAM(params, torch.optim.SGD, rho=0.1, **options),
    "asam": lambda params, reference, **options: SAM(params, torch.optim.SGD, rho=0.1, adaptive=True, **options),
    "tsbd": lambda params, reference, **options: GradientNorm(
        params, torch.optim.SGD, rho=0.05, alpha=0.7, scope="tensor", **options
    ),
    "pam": lambda params, reference, **options: PAM(params, torch.optim.SGD, reference=reference, rho=0.1, **options),
    "adamw": lambda params, reference, **options: SAM(params, torch.optim.AdamW, rho=0.1, lr=0.01),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_dict_takes_the_run_up_where_it_was(name, tmp_path):
    def start():
        model, reference = network(), network()
        with torch.no_grad():
            reference[0].weight.add_(0.1)
        return model, MAKERS[name](model.named_parameters(), list(reference.parameters()), **SGD)

    undisturbed, optimizer = start()
    train(undisturbed, optimizer, 6)
    model, optimizer = start()
    train(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    resumed, optimizer = start()
    stored = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(stored["model"])
    optimizer.load_state_dict(stored["optimizer"])
    train(resumed, optimizer, 3, first=3)
    assert torch.equal(weights(resumed), weights(undisturbed))


def test_groups_of_other_options_share_one_norm():
    """One norm over groups of different rho, learning rate and dtype."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.randn(4, 4))
    model[1].bfloat16()
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "rho": 1.0, "lr": 0.5}]
    optimizer = SAM(groups, torch.optim.SGD, rho=0.5, lr=0.1)
    first = [torch.full((4, 4), 2.0), torch.full((4, 4), -1.0, dtype=torch.bfloat16)]
    before = [layer.weight.detach().clone() for layer in model]
    for layer, gradient in zip(model, first, strict=True):
        layer.weight.grad = gradient.clone()
    norm = (16 * 4 + 16 * 1) ** 0.5
    optimizer.first_step(zero_grad=True)
    for layer, start, rho, gradient in zip(model, before, (0.5, 1.0), first, strict=True):
        torch.testing.assert_close(layer.weight.detach(), (start.float() + rho * gradient.float() / norm).to(start))
        layer.weight.grad = gradient.clone()
    optimizer.second_step()
    for layer, start, lr, gradient in zip(model, before, (0.1, 0.5), first, strict=True):
        torch.testing.assert_close(layer.weight.detach(), (start.float() - lr * gradient.float()).to(start))


def test_a_learning_rate_scheduler_takes_either_optimizer(recwarn):
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    schedules = [torch.optim.lr_scheduler.StepLR(x, 1, gamma=0.5) for x in (optimizer, optimizer.base_optimizer)]
    backward(model)
    optimizer.first_step(zero_grad=True)
    backward(model)
    optimizer.second_step()
    for schedule in schedules:
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]
