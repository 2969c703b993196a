"""The loss of SAU on changed images."""

import math

import torch
from torch import nn

from bdfast.defenses import SAUDefense
from bdfast.defenses.sau import SharedLoss
from bdfast.training import Run


def sau_loss(compat: str | None, model: nn.Module) -> SharedLoss:
    options = {"teacher": model, "distill": 0.0, "overlay": 0.0, "model": model, "limits": (0.0, 1.0)}
    return SharedLoss(Run(amp=False), sau=SAUDefense(compat=compat), **options)


def test_avoiding_a_class_stays_finite_where_it_is_certain():
    generator = torch.Generator().manual_seed(0)
    loss = sau_loss(None, nn.Linear(1, 1))
    logits = 3 * torch.randn(20, 5, dtype=torch.float64, generator=generator)
    classes = torch.randint(5, (20,), generator=generator)
    probabilities = logits.softmax(1)[torch.arange(20), classes]
    torch.testing.assert_close(loss.avoided(logits, classes), -torch.log(1 - probabilities), rtol=1e-10, atol=1e-12)
    # In float32, in which -log(1 - p) is infinite from a gap of 17 on.
    certain = torch.tensor([[1000.0, 0.0, 0.0], [-1000.0, 0.0, 0.0], [1000.0, 1000.0, -1000.0]], requires_grad=True)
    avoided = loss.avoided(certain, torch.zeros(3, dtype=torch.long))
    expected = torch.tensor([1000 - math.log(2), 0.0, math.log(2)])
    torch.testing.assert_close(avoided, expected, rtol=0, atol=1e-4)
    gradient = torch.autograd.grad(avoided.sum(), certain)[0]
    expected = torch.tensor([[1.0, -0.5, -0.5], [0.0, 0.0, 0.0], [0.5, -0.5, 0.0]])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4)
