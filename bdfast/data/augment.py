"""Augmentation of whole batches on their device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class ShiftFlip:
    """Random crop after zero padding, and random horizontal flip, for each image by itself.

    What the published defenses train with; torchvision's transforms treat all images of a batch alike.

    Attributes:
        pixels: Most pixels that an image is shifted by, in either direction.
        flip: Mirror every second image.
    """

    pixels: int = 4
    flip: bool = True

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same shape; drawn from torch's generator."""
        count, channels, height, width = images.shape
        padded = F.pad(images, (self.pixels,) * 4)
        draw = torch.randint(0, 2 * self.pixels + 1, (2, count, 1), device=images.device)
        rows = draw[0] + torch.arange(height, device=images.device)
        columns = draw[1] + torch.arange(width, device=images.device)
        if self.flip:
            mirrored = torch.rand(count, 1, device=images.device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        image = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
        channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
        return padded[image, channel, rows.view(count, 1, height, 1), columns.view(count, 1, 1, width)]
