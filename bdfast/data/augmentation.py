"""Augmentation of whole batches on their device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Augmentation:
    """Random shift and mirroring, for each image by itself; neither changes a label.

    A few hundred images are soon memorised, and a network fine-tuned on them as they are recovers its
    backdoor (docs/choosing-strength.md). Torchvision's transforms treat all images of a batch alike.

    Attributes:
        shift: Most pixels to shift by, in either direction; a 28th of the shorter side when left out. The least value
            of each channel in the batch follows from outside, which is black for images in [0, 1].
        flip: Mirror every second image, for data in which left and right mean the same.
    """

    shift: int | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        if self.shift is not None and self.shift < 0:
            raise ValueError(f"shift: expected pixels >= 0, got {self.shift}; 0 shifts nothing.")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same shape, drawn from torch's generator; data of another shape is left alone."""
        if images.ndim != 4 or not images.is_floating_point():
            return images
        count, channels, height, width = images.shape
        shift = min(height, width) // 28 if self.shift is None else self.shift
        darkest = images.amin((0, 2, 3), keepdim=True)
        padded = darkest.expand(count, channels, height + 2 * shift, width + 2 * shift).clone()
        padded[:, :, shift : shift + height, shift : shift + width] = images
        draw = torch.randint(0, 2 * shift + 1, (2, count, 1), device=images.device)
        rows = draw[0] + torch.arange(height, device=images.device)
        columns = draw[1] + torch.arange(width, device=images.device)
        if self.flip:
            mirrored = torch.rand(count, 1, device=images.device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        image = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
        channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
        return padded[image, channel, rows.view(count, 1, height, 1), columns.view(count, 1, 1, width)]


def overlaid(images: torch.Tensor, most: float) -> torch.Tensor:
    """Lay another image of the batch faintly over each: x' = (1 - a) x + a other, a uniform in [0, most].

    The mixture of Zhang et al., "mixup" (ICLR 2018), but with the label of the stronger image: the model learns to
    ignore faint patterns, such as a trigger that was blended in.

    Args:
        images: [B, C, H, W]; data of another shape is left alone.
        most: Greatest weight of the other image, below 0.5.
    """
    if images.ndim != 4 or most == 0 or not images.is_floating_point():
        return images
    weights = most * torch.rand(len(images), 1, 1, 1, device=images.device)
    others = images[torch.randperm(len(images), device=images.device)]
    return images.lerp(others, weights.to(images.dtype))
