"""Triggers in the frequency domain: FTrojan, CTRL and what they have in common.

Adding to coefficients of a linear transform is adding a fixed pattern to the image: T^-1(T(x) + d) = x + T^-1(d). So
the pattern is made once for each size, and no image is transformed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from bdfast.attacks.base import Attack
from bdfast.errors import nearest

Space = Literal["ycc", "yuv", "rgb"]
Transform = Literal["dct", "fft", "dwt"]

# What one unit of each channel adds to red, green and blue.
_TO_RGB: dict[str, tuple[tuple[float, float, float], ...]] = {
    "ycc": ((1, 1, 1), (1.403, -0.714, 0), (0, -0.344, 1.773)),  # Y, Cr, Cb of OpenCV
    "yuv": ((1, 1, 1), (0, -0.396, 2.029), (1.14, -0.581, 0)),  # of kornia
    "rgb": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
}


@dataclass(frozen=True)
class Frequency(Attack):
    """A constant added to coefficients of a transform of windows of the image; `FTrojan` and `CTRL` are such attacks.

    The windows start at the upper left. Those that reach beyond the image are cut, so that images of any size do. A
    grey image has one channel, which gets the pattern, whatever `channels` says.

    Attributes:
        space: Colour space: "ycc" is OpenCV's YCrCb, "yuv" has the coefficients of kornia.
        transform: "dct" (DCT-II), "fft", or "dwt", the Haar wavelets, which decompose rows and columns completely. All
            are orthonormal. With "fft", half of `magnitude` goes to the coefficient and half to its mirror image, so
            that the image stays real.
        window: Side of the windows in pixels; a power of two for "dwt".
        channels: Which channels of the colour space get the pattern, counted from 0.
        positions: The coefficients (row, column) in each window, counted from 0.
        magnitude: What is added to them, in grey levels of 255.
        training_magnitude: What is added to them in training images; `magnitude` where left out.
    """

    space: Space = "ycc"
    transform: Transform = "dct"
    window: int = 32
    channels: tuple[int, ...] = (1, 2)
    positions: tuple[tuple[int, int], ...] = ((15, 15), (31, 31))
    magnitude: float = 30.0
    training_magnitude: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (("space", self.space, _TO_RGB), ("transform", self.transform, _BASES)):
            if value not in known:
                raise ValueError(
                    f"{name}: expected one of {', '.join(known)}, got {value!r}; {nearest(str(value), known)}"
                )
        power = self.window & (self.window - 1) == 0
        if self.window < 2 or (self.transform == "dwt" and not power):
            raise ValueError(
                f"window: expected at least 2 pixels, a power of two for dwt, got {self.window}; 32 is the default."
            )
        if not self.channels or any(not 0 <= channel <= 2 for channel in self.channels):
            raise ValueError(f"channels: expected some of 0, 1 and 2, got {self.channels}; (1, 2) is the default.")
        if not self.positions or any(not 0 <= i < self.window for position in self.positions for i in position):
            raise ValueError(
                f"positions: expected (row, column) of coefficients below {self.window}, the window, got "
                f"{self.positions}; choose others or a larger window."
            )
        for name, magnitude in (("magnitude", self.magnitude), ("training_magnitude", self.training_magnitude)):
            if magnitude is not None and not 0 < abs(magnitude) < math.inf:
                raise ValueError(
                    f"{name}: expected a number other than 0, got {magnitude}; 30 is the default of FTrojan, 100 of "
                    "CTRL."
                )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] with C = 1 or 3 -> a triggered copy.

        Raises:
            ValueError: They have another number of channels.
        """
        return self._added(images, self.magnitude)

    def poison(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Training images [B, C, H, W] with the trigger of `training_magnitude`."""
        return self._added(images, self.magnitude if self.training_magnitude is None else self.training_magnitude)

    def _added(self, images: torch.Tensor, magnitude: float) -> torch.Tensor:
        channels, height, width = images.shape[-3:]
        if channels not in (1, 3):
            raise ValueError(f"images: expected 1 or 3 channels, got {channels}; choose another attack.")
        wave = _wave(self.transform, self.window, tuple(map(tuple, self.positions)), height, width)
        to_rgb = torch.tensor(_TO_RGB[self.space], dtype=torch.float64)
        color = to_rgb.new_ones(1) if channels == 1 else to_rgb[list(self.channels)].sum(0)
        pattern = color.view(-1, 1, 1) * wave * (magnitude / 255)
        return images.add(pattern.to(images)).clamp_(0, 1)


@dataclass(frozen=True)
class FTrojan(Frequency):
    """Wang, Yao, Xu, An, Tong and Wang, "An invisible black-box backdoor attack through frequency domain", ECCV 2022.

    Two coefficients of the DCT of 32x32 windows of Cr and Cb. The values are those of BackdoorBench. The public code
    has YCrCb in whole numbers before and after the transform; here images are rounded once, in RGB.
    """


@dataclass(frozen=True)
class CTRL(Frequency):
    """Li, Pang, Xi, Du, Ji, Yao and Wang, "An embarrassingly simple backdoor attack on self-supervised learning".

    ICCV 2023, arXiv 2210.07346; here for supervised training, as in BackdoorBench. Two coefficients of the DCT of U
    and V. Only images of the target class are triggered, and no label is changed.

    The authors' code and BackdoorBench use a magnitude of 100 for training and test; the README of TSC (ICML 2025) has
    200 for the attacker's training: `training_magnitude=200`. Both codes also have a wavelet variant that nothing
    switches on: `transform="dwt", window=8, positions=((1, 1),), channels=(1,)`, the diagonal band of the third level.
    The window of BackdoorBench is the whole image; the authors' is 32, as here.

    Attributes:
        poison_rate: Fraction of the training set that is triggered (BackdoorBench: 0.05, half of the target class
            where there are ten of equal size; the authors' code: 0.01).
        clean_label: Trigger images of the target class and leave their labels as they are.
        space: As for `Frequency`.
        magnitude: As for `Frequency`.
    """

    poison_rate: float = 0.05
    clean_label: bool = True
    space: Space = "yuv"
    magnitude: float = 100.0


def _dct(size: int) -> torch.Tensor:
    """The orthonormal DCT-II: row u is the wave of coefficient u. [size, size] float64."""
    steps = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / (2 * size) * torch.outer(steps, 2 * steps + 1)) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves


def _fft(size: int) -> torch.Tensor:
    """The same for the unitary Fourier transform; complex."""
    steps = torch.arange(size, dtype=torch.float64)
    angles = 2 * math.pi / size * (torch.outer(steps, steps) % size)
    return torch.polar(torch.full_like(angles, 1 / math.sqrt(size)), angles)


def _dwt(size: int) -> torch.Tensor:
    """The same for the orthonormal Haar wavelets, coarse ones first; `size` is a power of two."""
    waves = torch.ones(1, 1, dtype=torch.float64)
    while len(waves) < size:
        means, differences = waves.new_tensor([[1, 1]]), waves.new_tensor([[1, -1]])
        finer = torch.kron(torch.eye(len(waves), dtype=torch.float64), differences)
        waves = torch.cat([torch.kron(waves, means), finer]) / math.sqrt(2)
    return waves


_BASES = {"dct": _dct, "fft": _fft, "dwt": _dwt}


@lru_cache(maxsize=8)  # a view asks for it once per image
def _wave(transform: str, window: int, positions: tuple[tuple[int, int], ...], height: int, width: int) -> torch.Tensor:
    """The inverse transform of ones at `positions`, window by window: [H, W] float64."""
    basis = _BASES[transform](window)
    tile = torch.stack([torch.outer(basis[row], basis[column]) for row, column in positions]).sum(0)
    tile = tile.real if tile.is_complex() else tile
    return tile.repeat(-(-height // window), -(-width // window))[:height, :width].contiguous()
