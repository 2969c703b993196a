"""How long to train, as a number of updates: what moves a network is how many there are, and how large each one is.

Twelve epochs of 400 images in batches of 256 are 24 updates; the same epochs in batches of 32 are 156.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST_BATCH, MOST_BATCH = 128, 256


@dataclass(frozen=True)
class Budget:
    """Epochs and batch size that make about so many updates."""

    epochs: int
    batch_size: int


def budget(updates: int, samples: int) -> Budget:
    """Whole epochs of batches of `LEAST_BATCH`: smaller ones remove no more (docs/choosing-strength.md).

    Where one epoch in such batches is more than `updates`, the batches grow up to `MOST_BATCH`; beyond that one epoch
    has more updates than asked for.

    Args:
        updates: What is asked for, at least 1.
        samples: In an epoch, at least 1.
    """
    batch_size = min(MOST_BATCH, max(LEAST_BATCH, -(-samples // updates)))
    in_epoch = -(-samples // batch_size)
    return Budget(max(1, round(updates / in_epoch)), batch_size)
