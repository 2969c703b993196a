"""Blended: a faint pattern over the whole image."""

from dataclasses import dataclass

import torch

from bdfast.attacks.base import Attack


@dataclass(frozen=True)
class Blended(Attack):
    """Chen, Liu, Li, Lu and Song, "Targeted backdoor attacks using data poisoning" (arXiv 1712.05526, 2017).

    The pattern is the paper's "random pattern": uniform noise, the same for every image, drawn from
    `pattern_seed`; it is made for the size of the images that it meets.

    Attributes:
        alpha: Weight of the pattern: x' = (1 - alpha) x + alpha pattern.
        pattern_seed: Seed of the noise.
    """

    alpha: float = 0.2
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha: expected a number in (0, 1], got {self.alpha}; the paper uses 0.2.")

    def pattern(self, shape: torch.Size) -> torch.Tensor:
        """The noise for images of `shape` [C, H, W], uniform in [0, 1]."""
        return torch.rand(shape, generator=torch.Generator().manual_seed(self.pattern_seed))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a triggered copy."""
        pattern = self.pattern(images.shape[-3:]).to(images)
        return images.lerp(pattern, self.alpha)
