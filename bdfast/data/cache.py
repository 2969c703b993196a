"""Passes over a test set that is decoded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bdfast.data.batches import Batch, Batches
from bdfast.data.images import ImageTensors, to_float, to_uint8


class CachedPasses:
    """In-order passes over `batches`; the first one keeps what fits into `budget` bytes of device memory.

    Images whose values are all multiples of 1/255, as those of an image file are, are kept as uint8, exactly;
    others as they came. A set that does not fit is not kept at all and streamed in every pass.
    """

    def __init__(self, batches: Batches, budget: int) -> None:
        self._batches, self._budget = batches, budget
        self._kept: list[tuple[bool, Batch]] | None = None
        self.name = batches.name

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is not None:
            yield from (_unpacked(batch) if packed else batch for packed, batch in self._kept)
            return
        # An ImageTensors lies on the device already.
        keeping = not isinstance(self._batches.data, ImageTensors)
        kept: list[tuple[bool, Batch]] = []
        left = self._budget
        for batch in self._batches.ordered():
            if keeping:
                kept.append(_packed(batch))
                left -= _bytes(kept[-1][1])
                if left < 0:
                    keeping = False
                    kept.clear()
            yield batch
        if keeping:  # reached only at the end of a whole pass
            self._kept = kept


def _packed(batch: Batch) -> tuple[bool, Batch]:
    if isinstance(batch, tuple | list) and isinstance(batch[0], torch.Tensor):
        images = batch[0]
        if images.dtype == torch.float32:
            small = to_uint8(images)
            if torch.equal(to_float(small), images):
                return True, (small, *batch[1:])
    return False, batch


def _unpacked(batch: Batch) -> Batch:
    return (to_float(batch[0]), *batch[1:])


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, tuple | list) else 0
