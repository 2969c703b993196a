"""A small network that knows the digits, without a backdoor."""

import pytest
import torch
from torch import nn

from bdfast.training import fit


@pytest.fixture(scope="session")
def trained(digits):
    """Five layers; the last is called 4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    fit(model, digits[0], epochs=4, amp=False)
    return model.eval()


@pytest.fixture
def clean(digits):
    """96 of the defender's images."""
    return digits[1].subset(torch.arange(96))
