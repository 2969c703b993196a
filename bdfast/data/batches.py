"""Repeatable passes over a data set, in batches, on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from bdfast.data.images import ImageTensors

Batch = Any
"""Whatever the data yields: (images, labels), or what the user's `forward` understands."""


class Batches:
    """A data set as the methods see it: it can be read in order, shuffled by a seed, and split.

    Of a DataLoader the data set, batch size, collate function and workers are used; order and shuffling are the
    method's own, so that a seed fixes them. An `ImageTensors` is kept on the device and never goes through workers.

    Args:
        data: Map-style data set or DataLoader.
        device: Where batches are delivered.
        batch_size: For a data set; a DataLoader brings its own.
        name: What error messages call the data.
    """

    def __init__(
        self,
        data: Dataset[Any] | DataLoader[Any],
        *,
        device: torch.device | str,
        batch_size: int = 256,
        name: str = "clean",
    ) -> None:
        self.device, self.name = torch.device(device), name
        self._collate: Callable[[list[Any]], Any] | None = None
        self._workers = 0
        if isinstance(data, DataLoader):
            self._collate, self._workers = data.collate_fn, data.num_workers
            batch_size = data.batch_size or batch_size
            data = data.dataset
        if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            raise TypeError(
                f"{name}: expected a map-style data set (with a length) or a DataLoader over one, got "
                f"{type(data).__name__}; a stream cannot be shuffled or split, so collect it into a list first."
            )
        if len(data) == 0:
            raise ValueError(f"{name}: expected at least one sample, got an empty data set; pass some images.")
        self.batch_size = batch_size
        self._shuffles = True
        self._numbers = torch.arange(len(data))
        self.data: Any = data.to(self.device) if isinstance(data, ImageTensors) else data

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.data)

    def ordered(self) -> Iterator[Batch]:
        """Every sample once, in the order of the data."""
        return (batch for _, batch in self.numbered())

    def numbered(self) -> Iterator[tuple[torch.Tensor, Batch]]:
        """The same with the indices [B] of the samples, in the data that the first `Batches` was made of."""
        return self._read(torch.arange(len(self)))

    def shuffled(self, seed: int) -> Iterator[Batch]:
        """Every sample once, in an order that `seed` fixes; a last batch of one sample is left out.

        One sample has no variance, which BatchNorm in training mode refuses.
        """
        if not self._shuffles:
            return self.ordered()
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        if len(order) % self.batch_size == 1 and len(order) > 1:
            order = order[:-1]
        return (batch for _, batch in self._read(order))

    def split(self, fraction: float, seed: int) -> tuple[Batches, Batches]:
        """Two disjoint parts; the first has `fraction` of the samples, drawn by `seed`."""
        count = round(fraction * len(self))
        if not 0 < count < len(self):
            raise ValueError(
                f"{self.name}: expected enough samples to set {fraction:.0%} of them apart, got {len(self)}; "
                "pass more samples."
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self._part(order[:count].sort().values), self._part(order[count:].sort().values)

    def unshuffled(self) -> Batches:
        """The same data, which `shuffled` leaves in its order."""
        same = copy.copy(self)
        same._shuffles = False
        return same

    def _part(self, indices: torch.Tensor) -> Batches:
        part = object.__new__(Batches)
        part.__dict__.update(self.__dict__)
        part._numbers = self._numbers[indices]
        if isinstance(self.data, ImageTensors):
            part.data = self.data.subset(indices.to(self.device))
        else:
            part.data = Subset(self.data, indices.tolist())
        return part

    def _read(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, Batch]]:
        numbers = self._numbers[order].split(self.batch_size)
        if isinstance(self.data, ImageTensors):
            chunks = order.to(self.device).split(self.batch_size)
            yield from zip(numbers, map(self.data.batch, chunks), strict=True)
            return
        loader = DataLoader(
            Subset(self.data, order.tolist()),
            batch_size=self.batch_size,
            collate_fn=self._collate,
            num_workers=self._workers,
            pin_memory=self.device.type == "cuda",
        )
        for indices, batch in zip(numbers, loader, strict=True):
            yield indices, to_device(batch, self.device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The tensors of a batch, in tuples, lists and mappings at any depth, on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
