"""The labels of a data set, as its samples have them."""

from __future__ import annotations

import warnings
from collections.abc import Sized
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from bdfast.data.images import ImageTensors

MANY = 10_000
"""From this many samples on it is said that all of them are read."""


def labels_of(data: Dataset[Any]) -> torch.Tensor:
    """All labels [N] int64 of a data set of (image, label, ...).

    They are those of the samples: what a set stores as `targets` is not believed, since a `target_transform` or a view
    may change it. Without decoding an image they are had from `ImageTensors`, `TensorDataset` and torchvision's own
    classes without a transform of the targets, and from subsets and concatenations of these; otherwise every sample is
    read once, with a warning where there are many.

    Raises:
        TypeError: The data set has no length.
        ValueError: A label is no whole number.
    """
    if not isinstance(data, Sized):
        raise TypeError(
            f"data: expected a data set with a length, got {type(data).__name__}; use a map-style data set."
        )
    stored = _stored_labels(data)
    if stored is not None:
        return stored
    if len(data) >= MANY:
        warnings.warn(f"data: reading {len(data):,} samples of {type(data).__name__} for their labels.", stacklevel=3)
    return torch.tensor([_number(data[i][1], i) for i in range(len(data))], dtype=torch.int64)


def _stored_labels(data: Any) -> torch.Tensor | None:
    if type(data) is ImageTensors:
        return data.labels
    if type(data) is TensorDataset:
        labels = data.tensors[1]
        return labels.long() if labels.ndim == 1 and not labels.is_floating_point() else None
    if type(data) is Subset:
        inner = _stored_labels(data.dataset)
        return None if inner is None else inner[torch.as_tensor(data.indices, dtype=torch.int64)]
    if type(data) is ConcatDataset:
        parts = [_stored_labels(part) for part in data.datasets]
        return None if any(part is None for part in parts) else torch.cat(parts)  # type: ignore[arg-type]
    if type(data).__module__.startswith("torchvision.datasets.") and hasattr(data, "targets"):
        joint = getattr(data, "transforms", None)
        plain = joint is None or type(joint).__name__ == "StandardTransform"
        if plain and getattr(data, "target_transform", None) is None and len(data.targets) == len(data):
            return torch.as_tensor(data.targets).long()
    return None


def _number(label: Any, index: int) -> int:
    try:
        number = int(label)
        if number == float(label):
            return number
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ValueError(
        f"data: expected a class number as the label of sample {index}, got {label!r}; give every sample an integer "
        "label."
    )
