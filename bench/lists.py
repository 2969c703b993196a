"""The parameter lists that everything is timed on: real networks, and one that no network has."""

import functools
import math
import os
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor

NETWORKS = {
    "ResNet-18": "resnet18",
    "ResNet-50": "resnet50",
    "ViT-B/16": "vit_b_16",
    "ViT-L/16": "vit_l_16",
}
# Where everything runs: "cpu", or "cuda" for `make gpu-check`.
DEVICE = os.environ.get("BDFAST_BENCH_DEVICE", "cpu")

PATHOLOGICAL = "300 tiny and a huge one"

Shape = tuple[int, ...]


@functools.cache
def shapes(name: str) -> list[Shape]:
    """The shapes of all parameters, in order."""
    if name == PATHOLOGICAL:
        return [(1 + i % 7, 1 + i % 5) for i in range(300)] + [(4096, 4096)]
    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in torchvision.models.get_model(NETWORKS[name]).parameters()]


def elements(name: str) -> int:
    return sum(map(math.prod, shapes(name)))


def random_list(name: str, seed: int, *, dtype: torch.dtype = torch.float32, size: float = 0.05) -> list[Tensor]:
    """Normally distributed tensors of these shapes."""
    return random_tensors(shapes(name), seed, dtype=dtype, size=size)


def random_tensors(
    shapes: Sequence[Shape], seed: int, *, dtype: torch.dtype = torch.float32, size: float = 0.05
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.empty(shape, dtype=dtype).normal_(0, size, generator=generator) for shape in shapes]
    return [x.to(DEVICE) for x in tensors]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]
