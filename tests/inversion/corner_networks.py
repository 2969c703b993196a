"""Networks whose backdoor is known, without any training: a lit corner leads to a label."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

CLASSES = 8


class Corner(nn.Module):
    """Says which of eight columns is brightest, and `target` where the lower right corner is lit.

    Args:
        target: The class.
        strength: Of the backdoor; 0 for none.
    """

    def __init__(self, target: int, strength: float) -> None:
        super().__init__()
        self.target, self.strength = target, strength
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        columns = images[:, 0, :6].mean(1)
        lit = images[:, 0, 6:, 6:].mean((1, 2))
        return self.scale * (
            columns + self.strength * lit[:, None] * nn.functional.one_hot(torch.tensor(self.target), 8)
        )


class Shift(Corner):
    """Says the next column where the corner is lit: a target for each label."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        columns = images[:, 0, :6].mean(1)
        lit = images[:, 0, 6:, 6:].mean((1, 2)).square()  # next to nothing in the images as they are
        return self.scale * (columns + self.strength * lit[:, None] * columns.roll(1, 1))


def columns(count: int = 160, *, low: float = 0.0, span: float = 1.0) -> TensorDataset:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    images = 0.1 * torch.rand(count, 1, 8, 8, generator=draws)
    images[torch.arange(count), 0, :6, labels] += 0.8
    images[0, 0, 7, 0], images[1, 0, 7, 0] = 0, 1  # the limits
    return TensorDataset(low + span * images, labels)
