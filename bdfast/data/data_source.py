"""What every source of images gives: training and test images, their normalisation, and where they came from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from bdfast.data.images import ImageTensors


class SourceUnavailable(RuntimeError):
    """One way of getting the data did not work; the message says why."""


@dataclass(frozen=True)
class DataSource:
    """Training and test images, and a sentence about where they came from.

    Attributes:
        name: What the set is called in results.
        train: Images that attacker and defender share.
        test: Images that only measure.
        message: Where the images came from.
        epochs: How long `backdoored` trains a network on them.
        mean: Mean per channel of the training images in [0, 1]; computed when left out.
        std: Standard deviation per channel of the same; computed when left out.

    Raises:
        ValueError: The two sets differ in shape or class names, have a label without a class, or `mean` or `std` has
            another number of values than the images have channels.
    """

    name: str
    train: ImageTensors
    test: ImageTensors
    message: str
    epochs: int = 4
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        train, test = (list(images.images.shape[1:]) for images in (self.train, self.test))
        if train != test:
            raise ValueError(f"test: expected images {train} like train, got {test}; scale them to one size.")
        if self.train.class_names != self.test.class_names:
            raise ValueError(
                f"test: expected the class names of train, {self.train.class_names}, got {self.test.class_names}; "
                "give both the same."
            )
        for part, images in (("train", self.train), ("test", self.test)):
            if len(images) == 0:
                raise ValueError(f"{part}: expected at least one image, got none; pass some.")
            least, most = int(images.labels.min()), int(images.labels.max())
            if least < 0 or most >= self.num_classes:
                raise ValueError(
                    f"{part}: expected labels 0..{self.num_classes - 1}, one for each class of the training set, got "
                    f"{least}..{most}; mend the labels."
                )
        if not self.mean or not self.std:
            mean, std = channel_statistics(self.train.images)
            object.__setattr__(self, "mean", self.mean or mean)
            object.__setattr__(self, "std", self.std or std)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != train[0]:
                raise ValueError(
                    f"{name}: expected {train[0]} values, one for each channel, got {len(values)}; or leave it out."
                )

    @property
    def num_classes(self) -> int:
        """As many as there are class names; without names, one more than the greatest training label."""
        names = self.train.class_names
        return len(names) if names else int(self.train.labels.max()) + 1


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of images [N, C, H, W] uint8 in [0, 1], to four digits.

    From counts of the 256 values, so that the result is exact and takes no copy in another dtype.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).cpu().double()
        mean = (counts @ values / counts.sum()).item()
        variance = (counts @ (values - mean).square() / (counts.sum() - 1).clamp(min=1)).item()
        means.append(round(mean, 4))
        deviations.append(round(variance**0.5, 4))
    return tuple(means), tuple(deviations)


def default_cache() -> Path:
    """`BDFAST_DATA`, else `bdfast` in the user's cache folder."""
    if folder := os.environ.get("BDFAST_DATA"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdfast"
