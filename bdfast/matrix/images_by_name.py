"""Images of a grid by name: the one place that knows the table of sources."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor

from bdfast import scenario
from bdfast.data.sources import DataSource, SourceUnavailable, digits_source


def known_data() -> tuple[str, ...]:
    """The names."""
    return scenario.DATA


def load_data(name: str) -> DataSource:
    """The images of this name.

    Raises:
        SourceUnavailable: They cannot be had; no other images take their place.
    """
    if name == "digits":
        return digits_source()
    source = scenario.demo_data()
    if source.name == "digits":
        raise SourceUnavailable(f"data: expected {name}, got {source.message}; provide it, or choose digits.")
    return source


@dataclass(frozen=True)
class DataFacts:
    """What a grid has to know about its images before it starts.

    Attributes:
        name: As in the grid.
        digest: SHA-256 of the training images and their labels.
        shape: Of one image, (C, H, W).
        epochs: How long a network trains on them.
        class_names: Names of the classes.
        mean: Mean per channel of the training images in [0, 1], to four digits.
        std: Their standard deviation, likewise.
    """

    name: str
    digest: str
    shape: tuple[int, ...]
    epochs: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)


def data_facts(name: str, source: DataSource) -> DataFacts:
    """Look at the images once."""
    digest = hashlib.sha256()
    for tensor in (source.train.images, source.train.labels):
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    mean, std = _statistics(source.train.images)
    return DataFacts(
        name=name,
        digest=digest.hexdigest(),
        shape=tuple(source.train.images.shape[1:]),
        epochs=scenario.EPOCHS[source.name],
        class_names=tuple(source.train.class_names or ()),
        mean=mean,
        std=std,
    )


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = [images[:, channel].float() / 255 for channel in range(images.shape[1])]
    return tuple(round(x.mean().item(), 4) for x in channels), tuple(round(x.std().item(), 4) for x in channels)
