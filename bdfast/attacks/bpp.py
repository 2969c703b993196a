"""BppAttack: fewer levels per colour channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bdfast.attacks.base import Attack


@dataclass(frozen=True)
class Bpp(Attack):
    """Wang, Zhai and Ma, "BppAttack", CVPR 2022: each channel is rounded to few levels.

    x' = round(x (levels - 1)) / (levels - 1), as in the public code. The code's dithering, which is off by default
    there, is left out: it goes through the pixels one by one. As in the public code, negative samples keep their label
    and get the change that rounding makes to another image, so that only the rounding of the image itself is a trigger.

    Attributes:
        levels: Levels that are left of 256; "squeeze_num" of the public code.
        neg_ratio: Negative samples, as a fraction of the training set (BackdoorBench: 0.1; the authors' code: 0.2).
    """

    levels: int = 8
    neg_ratio: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.levels < 256:
            raise ValueError(f"levels: expected 2 to 255, got {self.levels}; the public code uses 8.")
        if not 0 <= self.neg_ratio < 1:
            raise ValueError(
                f"neg_ratio: expected a fraction in [0, 1), got {self.neg_ratio}; 0 means no negative samples."
            )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a triggered copy."""
        return images.mul(self.levels - 1).round_().div_(self.levels - 1)

    def cross_count(self, poisoned: int) -> int:
        """How many negative samples there are beside `poisoned` images."""
        return round(self.neg_ratio * poisoned / self.poison_rate)

    def cross(self, image: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A negative sample [C, H, W]: `image` with the change that the trigger makes to `other`."""
        return image.add(self(other)).sub_(other).clamp_(0, 1)
