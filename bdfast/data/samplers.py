"""Which samples a DataLoader uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

MOST_TIMES = 100
"""A sampler that gives more indices than this many times the length of the data is taken for one without an end."""


def sampled_indices(loader: DataLoader[Any], name: str) -> tuple[torch.Tensor | None, int]:
    """The indices [N] that one pass of the loader uses, None for all of them in order; and its batch size.

    `drop_last` and the order do not count. Reading a sampler leaves torch's generators, and one of its own, as they
    were.

    Raises:
        TypeError: The loader makes its batches by other means: a subclass with an `__iter__` of its own, or
            `batch_size=None`.
        ValueError: The sampler has no end.
    """
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise TypeError(
            f"{name}: expected a DataLoader of torch, got {type(loader).__name__}, which makes its batches by itself; "
            "pass its data set, or a torch.utils.data.DataLoader with the same collate_fn."
        )
    if loader.batch_sampler is None:
        if isinstance(loader.dataset, torch.utils.data.IterableDataset):
            return None, 1  # refused by the caller, with the reason
        raise TypeError(
            f"{name}: expected a DataLoader that makes batches, got batch_size=None; give it a batch size, or pass the "
            "data set."
        )
    if isinstance(loader.dataset, torch.utils.data.IterableDataset):
        return None, loader.batch_size or 1
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        groups = [list(group) for group in _read(batches, batches, loader, name)]
        indices = [index for group in groups for index in group]
        return _tensor(indices, loader, name), max(map(len, groups), default=1)
    sampler, size = batches.sampler, batches.batch_size
    everything = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if everything and getattr(sampler, "data_source", None) is loader.dataset:
        return None, size
    return _tensor(list(_read(sampler, batches, loader, name)), loader, name), size


def _read(sampler: Iterable[Any], owner: object, loader: DataLoader[Any], name: str) -> Iterator[Any]:
    most = MOST_TIMES * max(1, len(loader.dataset))  # type: ignore[arg-type]
    with _generators_kept(sampler, owner):
        read = list(islice(sampler, most + 1))
    if len(read) > most:
        raise ValueError(
            f"{name}: expected a sampler with an end, got more than {most:,} indices; limit what it gives in a pass."
        )
    return iter(read)


@contextmanager
def _generators_kept(*owners: object) -> Iterator[None]:
    """Samplers draw from torch's generator, or from one of their own; those inside a batch sampler count too."""
    inner = [getattr(owner, "sampler", None) for owner in owners]
    own = {id(g): g for x in (*owners, *inner) if isinstance(g := getattr(x, "generator", None), torch.Generator)}
    states = [(generator, generator.get_state()) for generator in own.values()]
    with torch.random.fork_rng([]):
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


def _tensor(indices: list[Any], loader: DataLoader[Any], name: str) -> torch.Tensor:
    length = len(loader.dataset)  # type: ignore[arg-type]
    try:
        numbers = torch.tensor([int(index) for index in indices], dtype=torch.int64)
    except (TypeError, ValueError) as error:
        kind = type(loader.sampler if isinstance(loader.sampler, Sampler) else loader.batch_sampler).__name__
        raise TypeError(
            f"{name}: expected a sampler of integer indices, got {kind}, which gives others ({error}); pass the data "
            "set itself, or a Subset of it."
        ) from error
    numbers = torch.where(numbers < 0, numbers + length, numbers)
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < length:
        raise ValueError(
            f"{name}: expected a sampler of indices below {length}, the length of the data, got {int(numbers.max())}; "
            "make the sampler for this data set."
        )
    return numbers
