"""Which of many classes are worth a search for the shortest change: a search for each of a thousand takes too long."""

from __future__ import annotations

import torch
from torch import Tensor

from bdfast.inversion.scene import Scene, losses_towards
from bdfast.inversion.universal import lead

MOST = 16
"""Classes that are left; where there are no more, nothing is done."""

KEPT = 0.5
"""Share of the classes that a round keeps."""

STEPS, PER_STEP, LENGTH = 10, 12, 0.06
"""Steps of a round, images in each, and the length of the changes, as a share of the range. Ten steps put the target
among the first half of ten classes on all tuning networks, three do not."""

JUDGED = 24
"""Images on which a change is measured."""

BLOCK = 100
"""Classes at once, so that the memory for their changes and gradients is bounded."""


def screened(scene: Scene, targets: Tensor, draws: torch.Generator) -> Tensor:
    """The `MOST` of `targets` [T] that images come closest to with a change of one length for each.

    In rounds, each of which keeps the better half of the classes and goes on with their changes. What counts is the
    share of the loss towards a class that is left, and not the loss itself: some classes are near all images.

    Args:
        scene: Network and images.
        targets: [T] labels.
        draws: Draws the images; not used where there are no more than `MOST` classes.
    """
    changes = torch.zeros(len(targets) if len(targets) > MOST else 0, *scene.images.shape[1:])
    while len(targets) > MOST:
        moved, left = [], []
        for led_to, change in zip(targets.split(BLOCK), changes.split(BLOCK), strict=True):
            placed = change.to(scene.images.device)
            lengths = placed.new_full((len(led_to),), LENGTH)
            placed = lead(scene, led_to.to(placed.device), placed, lengths, draws, steps=STEPS, images=PER_STEP)
            left.append(_left(scene, led_to, placed, scene.drawn(draws, judge=True)[:JUDGED]))
            moved.append(placed.to(changes.device))
        kept = torch.cat(left).argsort()[: max(MOST, round(KEPT * len(targets)))].sort().values  # NaN comes last
        targets, changes = targets[kept], torch.cat(moved)[kept]
    return targets


def _left(scene: Scene, targets: Tensor, changes: Tensor, order: Tensor) -> Tensor:
    """The share [T] of the loss towards each class that its change leaves; NaN where all images are of the class."""
    plain = scene.answers(lambda x: x, order)
    low, high = scene.limits
    shares = []
    for target, change in zip(targets.tolist(), changes, strict=True):
        changed = scene.answers(lambda x, change=change: (x + change).clamp(low, high), order)  # type: ignore[misc]
        others = scene.labels[order] != target
        after, before = (
            losses_towards(x, torch.full_like(order, target), scene.labels[order]) for x in (changed, plain)
        )
        shares.append(after[others].mean() / before[others].mean())
    return torch.stack(shares).cpu()
