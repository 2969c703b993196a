"""Repeatable passes over a data set, in batches, on one device: the data contract of all verbs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from bdfast.data.images import ImageTensors
from bdfast.data.samplers import sampled_indices

Batch = Any
"""Whatever the data yields: (images, labels), or what the user's `forward` understands."""

KEPT = ("worker_init_fn", "multiprocessing_context", "timeout", "prefetch_factor", "persistent_workers", "pin_memory")
"""What is taken over from a DataLoader beside its data, sampler, batch size, collate function and workers."""


class Batches:
    """A data set as the methods see it: it can be read in order, shuffled by a seed, and split.

    The sampler or batch sampler of a DataLoader decides which samples are used; their order and `drop_last` do not
    matter, since order and shuffling are the method's own, so that a seed fixes them. An `ImageTensors` is kept on the
    device and never goes through workers.

    Args:
        data: Map-style data set or DataLoader.
        device: Where batches are delivered.
        batch_size: For a data set; a DataLoader brings its own.
        name: What error messages call the data.

    Raises:
        TypeError: A stream, or a loader that makes its batches by other means than a DataLoader does.
        ValueError: There is no sample.
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
        self.collate: Callable[[list[Any]], Any] = collate
        self._options: dict[str, Any] = {}
        indices = None
        if isinstance(data, DataLoader):
            if data.collate_fn is not default_collate:
                self.collate = data.collate_fn
            self._options = {"num_workers": data.num_workers}
            self._options |= {option: getattr(data, option) for option in KEPT}
            indices, batch_size = sampled_indices(data, name)
            data = data.dataset
        if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            raise TypeError(
                f"{name}: expected a map-style data set (with a length) or a DataLoader over one, got "
                f"{type(data).__name__}; a stream cannot be shuffled or split, so collect it into a list first."
            )
        if len(data) == 0 or (indices is not None and len(indices) == 0):
            raise ValueError(f"{name}: expected at least one sample, got an empty data set; pass some images.")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}; 256 is the default.")
        self.batch_size = batch_size
        self._shuffles = True
        self._numbers = torch.arange(len(data)) if indices is None else indices
        self.data: Any = data
        if isinstance(data, ImageTensors):
            self.data = (data if indices is None else data.subset(indices)).to(self.device)
        elif indices is not None:
            self.data = Subset(data, indices.tolist())

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._numbers)

    def ordered(self) -> Iterator[Batch]:
        """Every sample once, in the order of the data; a last batch of one joins the batch before it.

        One sample has no variance, which BatchNorm in training mode refuses.
        """
        return (batch for _, batch in self.numbered())

    def numbered(self) -> Iterator[tuple[torch.Tensor, Batch]]:
        """The same with the indices [B] of the samples, in the data that the first `Batches` was made of."""
        chunks = list(torch.arange(len(self)).split(self.batch_size))
        if len(chunks) > 1 and len(chunks[-1]) == 1:
            chunks[-2:] = [torch.cat(chunks[-2:])]
        return self._read(chunks, seed=0)

    def shuffled(self, seed: int) -> Iterator[Batch]:
        """Every sample once, in an order that `seed` fixes; a last batch of one sample is left out."""
        if not self._shuffles:
            return self.ordered()
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        if len(order) % self.batch_size == 1 and len(order) > 1:
            order = order[:-1]
        return (batch for _, batch in self._read(list(order.split(self.batch_size)), seed))

    def split(self, fraction: float, seed: int) -> tuple[Batches, Batches]:
        """Two disjoint parts; the first has `fraction` of the samples, drawn by `seed`."""
        count = round(fraction * len(self))
        if not 0 < count < len(self):
            raise ValueError(
                f"{self.name}: expected enough samples to set {fraction:.0%} of them apart, got {len(self)}; "
                "pass more samples."
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.part(order[:count].sort().values), self.part(order[count:].sort().values)

    def in_batches_of(self, size: int) -> Batches:
        """The same data in other batches."""
        same = copy.copy(self)
        same.batch_size = size
        return same

    def unshuffled(self) -> Batches:
        """The same data, which `shuffled` leaves in its order."""
        same = copy.copy(self)
        same._shuffles = False
        return same

    def part(self, places: torch.Tensor) -> Batches:
        """The samples at these places [M], in that order."""
        part = object.__new__(Batches)
        part.__dict__.update(self.__dict__)
        part._numbers = self._numbers[places]
        if isinstance(self.data, ImageTensors):
            part.data = self.data.subset(places.to(self.device))
        else:
            part.data = Subset(self.data, places.tolist())
        return part

    def _read(self, chunks: list[torch.Tensor], seed: int) -> Iterator[tuple[torch.Tensor, Batch]]:
        if isinstance(self.data, ImageTensors):
            for places in chunks:
                yield self._numbers[places], self.data.batch(places.to(self.device))
            return
        options = {"pin_memory": self.device.type == "cuda", **self._options}
        batches = [places.tolist() for places in chunks]
        # A loader draws the seed of its workers; from torch's own generator that would show outside.
        draws = torch.Generator().manual_seed(seed)
        loader = DataLoader(self.data, batch_sampler=batches, collate_fn=self.collate, generator=draws, **options)
        try:
            for places, batch in zip(chunks, loader, strict=True):
                yield self._numbers[places], to_device(batch, self.device)
        except (RuntimeError, TypeError) as error:
            if "equal size" not in str(error) and "default_collate" not in str(error):
                raise
            raise ValueError(
                f"{self.name}: expected samples that can be put into one batch, got some that differ in size or are "
                f"of a kind that torch does not collate ({_first_line(error)}); resize the images (--size on the "
                "command line), or pass a DataLoader with a collate_fn."
            ) from error


def collate(samples: list[Any]) -> Any:
    """torch's collation; samples that are dataclasses become tuples of their fields."""
    if is_dataclass(samples[0]) and not isinstance(samples[0], type):
        samples = [tuple(getattr(sample, field.name) for field in fields(sample)) for sample in samples]
    return default_collate(samples)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The tensors of a batch, in tuples, lists and mappings at any depth, on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [to_device(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


def images_of(batch: Batch) -> torch.Tensor | None:
    """The images of a batch of (images [B, C, H, W], ...); None for inputs of another kind."""
    if isinstance(batch, tuple | list) and len(batch) > 0 and isinstance(batch[0], torch.Tensor):
        images = batch[0]
        return images if images.ndim == 4 and images.is_floating_point() else None
    return None


def with_images(batch: Batch, images: torch.Tensor) -> Batch:
    """The same batch with other images; a named tuple stays one."""
    return batch._replace(**{batch._fields[0]: images}) if hasattr(batch, "_fields") else (images, *batch[1:])


def _first_line(error: BaseException) -> str:
    """Of an error in a worker, torch gives the whole traceback."""
    return str(error).strip().splitlines()[-1]
