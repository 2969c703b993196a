"""A data set of two channels with a poisoned twentieth, and a network of a few channels."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

CLASSES = 5


@pytest.fixture
def network() -> nn.Module:
    """In float64, so that a plain transcription comes out the same to the last digits."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, CLASSES)
    ).double()
    torch.set_rng_state(generator_state)
    return model


@pytest.fixture
def suspicious() -> TensorDataset:
    """200 noisy images; the first 10 have a bright corner and label 3."""
    draws = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (200,), generator=draws)
    patterns = torch.rand(CLASSES, 2, 8, 8, generator=draws, dtype=torch.float64)
    images = 0.4 * patterns[labels] + 0.4 * torch.rand(200, 2, 8, 8, generator=draws, dtype=torch.float64)
    images[:10, :, :2, :2] = 1.0
    labels[:10] = 3
    return TensorDataset(images, labels)
