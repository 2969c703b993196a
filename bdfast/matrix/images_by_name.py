"""Images of a grid by name, and what a grid has to know of them before it starts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from bdfast.data.data_source import DataSource, SourceUnavailable
from bdfast.data.sources import load_source


def load_data(name: str) -> DataSource:
    """The images of this name.

    Raises:
        SourceUnavailable: They cannot be had; no other images take their place.
    """
    source = load_source(name)
    if source.name == "digits" != name:
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
        num_classes: How many classes there are.
        class_names: Their names; may be empty.
        mean: Mean per channel that networks subtract.
        std: Standard deviation per channel that they divide by.
    """

    name: str
    digest: str
    shape: tuple[int, ...]
    epochs: int
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def data_facts(name: str, source: DataSource) -> DataFacts:
    """Look at the images once."""
    digest = hashlib.sha256()
    for tensor in (source.train.images, source.train.labels):
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return DataFacts(
        name=name,
        digest=digest.hexdigest(),
        shape=tuple(source.train.images.shape[1:]),
        epochs=source.epochs,
        num_classes=source.num_classes,
        class_names=tuple(source.train.class_names or ()),
        mean=source.mean,
        std=source.std,
    )
