"""What the tests share of the methods that replace the last layer: a small network with one, and images for it."""

import math

import torch
from torch import nn
from torch.utils.data import TensorDataset

from bdfast.training.seeds import seeded

BATCH = 8


def network(classes: int = 3) -> nn.Module:
    with seeded(0, torch.device("cpu")):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes)
        ).double()


def images(count: int = 40, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 1, 4, 4, dtype=torch.float64, generator=generator)
    return TensorDataset(pixels, torch.randint(classes, (count,), generator=generator))


def norm_of(weight: torch.Tensor) -> float:
    return math.sqrt(sum(value**2 for value in weight.detach().double().flatten().tolist()))
