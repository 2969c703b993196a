"""WaNet: a smooth warp that is hard to see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional

from bdfast.attacks.base import Attack


@dataclass(frozen=True)
class WaNet(Attack):
    """Nguyen and Tran, "WaNet: imperceptible warping-based backdoor attack", ICLR 2021, arXiv 2102.10369.

    One fixed warp for all images: random shifts on a small grid, enlarged to the size of the images by bicubic
    interpolation. Noise samples keep their label and get the warp plus a random shift of each pixel, so that no other
    warp is a trigger. The public code draws them anew in every epoch; here they are part of the data. It knows only
    square images; here a shift is as many pixels in a wide image as in a high one.

    Attributes:
        grid_size: Side of the small grid, k in the paper.
        strength: s in the paper: the shifts are about s / 2 pixels long in each direction, whatever the size.
        warp_seed: Seed of the warp.
        cross_ratio: Noise samples for each poisoned image.
    """

    grid_size: int = 4
    strength: float = 0.5
    warp_seed: int = 0
    cross_ratio: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid_size < 2:
            raise ValueError(f"grid_size: expected at least 2, got {self.grid_size}; the paper uses 4.")
        if not 0 < self.strength <= 10:
            raise ValueError(f"strength: expected a number in (0, 10], got {self.strength}; the paper uses 0.5.")
        if not 0 <= self.cross_ratio <= 100:
            raise ValueError(
                f"cross_ratio: expected a number in [0, 100], got {self.cross_ratio}; the paper uses 2, and 0 means no "
                "noise samples."
            )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a triggered copy."""
        return _sampled(images, self._grid(images))

    def cross_count(self, poisoned: int) -> int:
        """How many noise samples there are beside `poisoned` images."""
        return round(self.cross_ratio * poisoned)

    def cross(self, image: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A noise sample [C, H, W]: `image` with the warp and a random shift of each pixel of up to half a pixel."""
        grid = self._grid(image)
        noise = torch.rand(grid.shape, generator=generator, dtype=grid.dtype).mul_(2).sub_(1)
        return _sampled(image, (grid + noise / _sides(grid)).clamp_(-1, 1))

    def _grid(self, images: torch.Tensor) -> torch.Tensor:
        return _warp(self.grid_size, self.strength, self.warp_seed, *images.shape[-2:])


@lru_cache(maxsize=8)  # a view asks for it once per image
def _warp(grid_size: int, strength: float, seed: int, height: int, width: int) -> torch.Tensor:
    """Where each pixel comes from: [H, W, 2] float64, (x, y) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.rand(1, 2, grid_size, grid_size, generator=generator).double().mul_(2).sub_(1)
    shifts /= shifts.abs().mean()
    smooth = functional.interpolate(shifts, (height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    ys, xs = (torch.linspace(-1, 1, side, dtype=torch.float64) for side in (height, width))
    still = torch.stack([xs.expand(height, -1), ys[:, None].expand(-1, width)], 2)
    return (still + strength * smooth / _sides(smooth)).clamp_(-1, 1)


def _sides(grid: torch.Tensor) -> torch.Tensor:
    """(W, H) of a grid [H, W, 2]."""
    return torch.tensor([grid.shape[1], grid.shape[0]], dtype=grid.dtype)


def _sampled(images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    batch = images.reshape(-1, *images.shape[-3:])
    if not len(batch):
        return images.clone()
    # torch has no 16-bit sampling on the CPU.
    batch = batch.to(torch.promote_types(images.dtype, torch.float32))
    grid = grid.to(batch).expand(len(batch), -1, -1, -1)
    # The weights of four pixels may add up to a little more than one.
    warped = functional.grid_sample(batch, grid, align_corners=True).clamp_(0, 1)
    return warped.to(images.dtype).reshape(images.shape)
