"""Input normalisation as the first layer of a network, so that images are [0, 1] everywhere outside it."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn


class Normalize(nn.Module):
    """(x - mean) / std per channel; mean and std travel in the state dict."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(
                f"std: expected {len(mean)} positive numbers like mean, got {list(std)}; give one per channel."
            )
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same shape."""
        return (x - self.mean) / self.std


def normalized(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Sequential:
    """`network` behind a `Normalize` layer; the parts are named `normalize` and `network`."""
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), network=network))
