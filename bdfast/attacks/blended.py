"""Blended: a faint pattern over the whole image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from bdfast.attacks.base import Attack
from bdfast.data.image_folder import read_image
from bdfast.data.images import to_float

GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey level, as Pillow has them."""


@dataclass(frozen=True)
class Blended(Attack):
    """Chen, Liu, Li, Lu and Song, "Targeted backdoor attacks using data poisoning" (arXiv 1712.05526, 2017).

    The pattern is the paper's "random pattern": uniform noise, the same for every image, drawn from
    `pattern_seed`; it is made for the size of the images that it meets. Or it is a picture of your own.

    Attributes:
        alpha: Weight of the pattern: x' = (1 - alpha) x + alpha pattern.
        pattern_seed: Seed of the noise.
        image: File with a picture that takes the place of the noise. It is stretched to the size of the images, and
            made grey for grey ones. It is read once, when the attack is made.
    """

    alpha: float = 0.2
    pattern_seed: int = 0
    image: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha: expected a number in (0, 1], got {self.alpha}; the paper uses 0.2.")
        # Not a field: an attack is described by the name of the file.
        object.__setattr__(self, "_picture", None if self.image is None else _read(self.image))

    def pattern(self, shape: torch.Size) -> torch.Tensor:
        """The pattern for images of `shape` [C, H, W], in [0, 1].

        Raises:
            ValueError: It is a picture, and the images are neither grey nor RGB.
        """
        picture: torch.Tensor | None = self._picture  # type: ignore[attr-defined]
        if picture is None:
            return torch.rand(shape, generator=torch.Generator().manual_seed(self.pattern_seed))
        if shape[0] not in (1, 3):
            raise ValueError(
                f"images: expected 1 or 3 channels for a picture as pattern, got {shape[0]}; leave image out."
            )
        if shape[0] == 1:
            picture = (picture * picture.new_tensor(GREY).view(3, 1, 1)).sum(0, keepdim=True)
        scaled = functional.interpolate(picture[None], tuple(shape[1:]), mode="bilinear", antialias=True)
        return scaled[0].clamp_(0, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a triggered copy."""
        pattern = self.pattern(images.shape[-3:]).to(images)
        return images.lerp(pattern, self.alpha)


def _read(path: str) -> torch.Tensor:
    """A picture [3, H, W] in [0, 1]."""
    try:
        image = read_image(Path(path))
    except ValueError as error:
        raise ValueError(
            f"image: expected the file of a picture, got {str(path)!r}, which cannot be read ({error.__cause__}); give "
            "a PNG or JPEG file."
        ) from error
    if isinstance(image, torch.Tensor):
        # Pixels of a file with floating point may be anything.
        picture = image.nan_to_num(0, 1, 0).clamp(0, 1)
    else:
        picture = to_float(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    return picture.expand(3, -1, -1).contiguous()
