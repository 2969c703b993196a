"""How long a change must be to lead images to each class: short for the target of a backdoor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdfast.inversion.scene import Scene
from bdfast.inversion.universal import GROWTH, REACHED, START, followed, lead

GAP = 1.2
"""Classes within this factor of the easiest one are suspects.

It lies between what clean networks and those with one target label showed in tuning cases; the records in bench/results
have the lengths of every case under "found".
"""

STEPS = 16
"""Steps of the search at each length; half as many blur the gap."""

MOST_SUSPECTS = 3
"""Most suspects at once; and no more than a third of the classes."""

SHORTER, SHORTEST = 0.4, 0.003
"""Factor between first lengths, and the one below which there is no other."""

BEYOND = 1.5
"""The search goes on to lengths this much beyond the first class."""


@dataclass(frozen=True, eq=False)
class LeastLengths:
    """What the search found for each class.

    Attributes:
        lengths: [K], root mean square of a pixel's change as a share of the range; infinite where the search ended
            before images followed, or where there are no images of other classes.
        changes: [K, C, H, W], of those lengths.
    """

    lengths: Tensor
    changes: Tensor

    @property
    def suspects(self) -> list[int]:
        """The classes that are hardly harder to reach than the easiest, by less than `GAP`, easiest first.

        None where that are more than `MOST_SUSPECTS`, as in many clean networks. Triggers that leave the labels alone,
        those that have a target for each class, and some that are no change of fixed pixels do not show here.
        """
        order = self.lengths.argsort()
        ordered = self.lengths[order]
        near = int((ordered < GAP * ordered[0]).sum()) if ordered[0].isfinite() else 0
        most = max(1, min(MOST_SUSPECTS, len(ordered) // 3))
        return order[:near].tolist() if near <= most and near < len(ordered) else []

    @property
    def clear(self) -> bool:
        """Whether all other classes are harder to reach than every suspect, by `GAP` at least."""
        ordered = self.lengths.sort().values
        count = len(self.suspects)
        return count > 0 and bool(ordered[count] >= GAP * ordered[count - 1])


def least_lengths(scene: Scene, draws: torch.Generator, *, among: list[int] | None = None) -> LeastLengths:
    """Lengthen one change for each class until the images follow it, and end a margin beyond the first class.

    A backdoor is a short way to its target for all images at once (Wang et al., "Neural Cleanse", S&P 2019). Classes
    that are reached are left alone from then on, so that only hard ones cost more.

    Args:
        scene: Network and images.
        draws: Draws the images.
        among: The classes to look at; all when left out.
    """
    start = START
    while (found := _lengthened(scene, draws, start, among)) is None:
        start *= SHORTER
    return found


def _lengthened(scene: Scene, draws: torch.Generator, start: float, among: list[int] | None) -> LeastLengths | None:
    """From a first length on; None where a class is reached at that one, which says nothing about shorter ones."""
    shape, device = scene.images.shape[1:], scene.images.device
    dtype = torch.promote_types(scene.images.dtype, torch.float32)
    changes = torch.zeros(scene.classes, *shape, device=device, dtype=dtype)
    lengths = torch.full((scene.classes,), torch.inf)
    open_ = torch.arange(scene.classes) if among is None else torch.tensor(among)
    length, before = start, torch.zeros(scene.classes)
    while len(open_) and length <= min(1.0, GROWTH * BEYOND * float(lengths.min())):
        targets = open_.to(device)
        together = torch.full((len(open_),), length, device=device)
        changes[targets] = lead(scene, targets, changes[targets], together, draws, steps=STEPS)
        rates = followed(scene, targets, changes[targets], scene.drawn(draws, judge=True)).cpu()
        there = rates >= REACHED
        if length == start and bool(there.any()) and start > SHORTEST:
            return None
        # Between two lengths, by how far the rates are from what is asked.
        share = (REACHED - before[open_]) / (rates - before[open_])
        lengths[open_[there]] = (length * GROWTH ** (share.clamp(0, 1) - 1))[there]
        before[open_] = rates
        open_ = open_[rates < REACHED]  # neither those that are reached, nor NaN: a class that all images are of
        length *= GROWTH
    return LeastLengths(lengths, changes)
