"""A small network that turns a clean image into one with a guessed trigger."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from bdfast.task import at_least_float32

FAINT = -4.0
"""Logit of the weight with which the paint starts to cover an image: 1.8 %."""


class Generator(nn.Module):
    """Paints over an image: x + a (p - x), with paint p and weight a in every pixel, from a U-Net and a fixed pattern.

    The pattern is the same for all images, as most triggers are; the U-Net adds what depends on the image. It starts
    next to the identity, so that it needs no training to get there, which the published inversion spends 50 epochs on.

    Args:
        shape: [C, H, W] of the images, H and W at least 4.
        width: Channels of its first level; they double on each of the two below.
        limits: Least and greatest pixel value, (0, 1) for images as bdfast reads them.
    """

    def __init__(self, shape: Sequence[int], *, width: int = 8, limits: Sequence[float] = (0.0, 1.0)) -> None:
        super().__init__()
        channels, height, breadth = shape
        self.low, self.high = limits

        def block(inputs: int, outputs: int) -> nn.Sequential:
            convolutions = [nn.Conv2d(i, outputs, 3, padding=1) for i in (inputs, outputs)]
            return nn.Sequential(*(layer for convolution in convolutions for layer in (convolution, nn.ReLU())))

        self.down = nn.ModuleList([block(channels, width), block(width, 2 * width), block(2 * width, 4 * width)])
        self.up = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.out = nn.Conv2d(width, 2 * channels, 1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)
        self.pattern = nn.Parameter(torch.zeros(1, 2 * channels, height, breadth))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] within the limits -> the same."""
        levels = [self.down[0](images)]
        for block in list(self.down)[1:]:
            levels.append(block(F.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for block in self.up:
            beside = levels.pop()
            x = block(torch.cat([F.interpolate(x, size=beside.shape[-2:]), beside], 1))
        paint, weight = (at_least_float32(self.out(x)) + self.pattern).chunk(2, 1)
        paint = self.low + torch.sigmoid(paint) * (self.high - self.low)
        return images.lerp(paint, torch.sigmoid(weight + FAINT))
