"""Who gets which training images: the attacker, and the defender with any share of what is put aside for him."""

from __future__ import annotations

import torch
from torch import Tensor

from bdfast.training.seeds import derived_seed

RESERVE = 0.1
"""Share of the training images that the attacker never sees.

It is the same for every share of clean images, so that one network serves all of them, and they are compared on the
same network. So the defender can have at most this share.
"""


def order(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions [A] of the attacker's training images and [R] of those put aside, R a tenth of `count`, shuffled."""
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(seed, "clean")))
    aside = round(RESERVE * count)
    return shuffled[aside:], shuffled[:aside]


def drawn(
    labels: Tensor, seed: int, *, num_classes: int, share: float | None = None, per_class: int | None = None
) -> Tensor:
    """Positions [N] of the defender's clean images; a smaller share is part of a larger one.

    Args:
        labels: Of all training images.
        seed: Of the choice.
        num_classes: How many classes there are.
        share: Of all training images, at most `RESERVE`; or
        per_class: that many of each class.

    Raises:
        ValueError: There is no such number of images, or the share is less than one image.
    """
    aside = order(len(labels), seed)[1]
    if share is not None:
        count = round(share * len(labels))
        if count < 1:
            raise ValueError(
                f"clean: expected at least one image, got none: {share} of {len(labels)} images; give a larger share."
            )
        return aside[:count]
    of_aside = labels[aside]
    taken = []
    for number in range(num_classes):
        own = aside[of_aside == number]
        if len(own) < (per_class or 0):
            raise ValueError(
                f"clean: expected at most {len(own)} images a class, which is what is put aside of class {number} with "
                f"seed {seed}, got {per_class}; give fewer."
            )
        taken.append(own[:per_class])
    return torch.cat(taken).sort().values
