"""BadNets: a small bright square in a corner."""

from dataclasses import dataclass

import torch

from bdfast.attacks.base import Attack


@dataclass(frozen=True)
class BadNets(Attack):
    """Gu, Dolan-Gavitt and Garg, "BadNets" (arXiv 1708.06733, 2017), all-to-one.

    Attributes:
        size: Side of the white square in pixels.
        margin: Pixels between the square and the lower and right border.
    """

    size: int = 3
    margin: int = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a triggered copy."""
        height, width = images.shape[-2:]
        bottom, right = height - self.margin, width - self.margin
        if self.size < 1 or self.margin < 0 or self.size > min(bottom, right):
            raise ValueError(
                f"size: expected a square that fits {height}x{width} pixels, got size {self.size} and margin "
                f"{self.margin}; choose smaller ones."
            )
        triggered = images.clone()
        triggered[..., bottom - self.size : bottom, right - self.size : right] = 1.0
        return triggered
