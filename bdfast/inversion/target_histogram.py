"""The class that a generator trained without a target label turns most images into."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from bdfast.data.batches import Batch
from bdfast.inversion.generator import Generator

NOISE = 0.03
"""Standard deviation of what is added to images before the predictions are counted, in `unit`s."""


@torch.no_grad()
def most_frequent_class(
    generator: Generator,
    logits: Callable[..., Tensor],
    batches: Iterable[Batch],
    classes: int,
    *,
    unit: float,
    draws: torch.Generator,
) -> tuple[int, list[float]]:
    """That class, and the share of the images that each class got.

    Args:
        generator: Puts the guessed trigger on images.
        logits: (images, labels, ...) -> [B, K].
        batches: Of (images, labels, ...).
        classes: K.
        unit: What a change of 1 is.
        draws: Draws the noise.
    """
    counts = torch.zeros(classes)
    for batch in batches:
        noise = torch.randn(batch[0].shape, generator=draws).to(batch[0]) * NOISE * unit
        counts += torch.bincount(logits(generator(batch[0] + noise), *batch[1:]).argmax(1), minlength=classes).cpu()
    return int(counts.argmax()), (counts / counts.sum()).tolist()
