"""SIG: a faint wave over the whole image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bdfast.attacks.base import Attack


@dataclass(frozen=True)
class SIG(Attack):
    """Barni, Kallas and Tondi, "A new backdoor attack in CNNs by training set corruption without label poisoning".

    ICIP 2019, arXiv 1902.11237. Vertical stripes: x' = x + delta sin(2 pi frequency j / W) in column j of W, clipped
    to [0, 1]. Only images of the target class are triggered, and no label is changed. With `clean_label=False` it is
    an attack with changed labels, for which `targets` can be given, too.

    Attributes:
        poison_rate: Fraction of the training set that is triggered. 0.05 is half of the target class where there are
            ten of equal size. BackdoorBench has 0.1, all of it, which cannot be reached where one image is missing.
        clean_label: Trigger images of the target class and leave their labels as they are.
        delta: Amplitude in grey levels of 255 (BackdoorBench: 40).
        frequency: Periods over the width of the image (BackdoorBench: 6).
    """

    poison_rate: float = 0.05
    clean_label: bool = True
    delta: float = 40.0
    frequency: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.delta <= 255:
            raise ValueError(f"delta: expected grey levels in (0, 255], got {self.delta}; BackdoorBench uses 40.")
        if not 0 < self.frequency < math.inf:
            raise ValueError(
                f"frequency: expected periods above 0 over the image, got {self.frequency}; BackdoorBench uses 6."
            )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a triggered copy."""
        width = images.shape[-1]
        columns = torch.arange(width, dtype=torch.float64)
        wave = (2 * math.pi * self.frequency / width * columns).sin_().mul_(self.delta / 255)
        return images.add(wave.to(images)).clamp_(0, 1)
