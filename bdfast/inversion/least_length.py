"""How long a change must be to lead images to each class: short for the target of a backdoor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdfast.inversion.scene import ALL_TO_ALL, Scene
from bdfast.inversion.screening import screened
from bdfast.inversion.universal import GROWTH, REACHED, START, followed, lead

GAP = 1.2
"""Classes within this factor of the easiest one are suspects.

It lies between what clean networks and those with one target label showed in tuning cases; the records in bench/results
have the lengths of every case under "found".
"""

STEPS = 16
"""Steps of the search at each length; half as many blur the gap."""

MOST_SUSPECTS, OF_MANY, MOST_OF_MANY = 3, 1 / 16, 8
"""Most suspects at once, and no more than a third of the classes. Of many classes more lie near each other: there, up
to this share of them, and this many, for the patches to tell apart."""

SHORTER, SHORTEST = 0.4, 0.003
"""Factor between first lengths, and the one below which there is no other."""

BEYOND = 1.5
"""The search goes on to lengths this much beyond the first class."""

SCATTERED = 0.5
"""How many labels a trigger with a target for each label leads to at least, as a share of those that there are."""

UNREACHED = 1.2
"""The length for classes that the search did not reach, as a multiple of the longest that it found."""


@dataclass(frozen=True, eq=False)
class LeastLengths:
    """What the search found for each class.

    Attributes:
        lengths: [K], root mean square of a pixel's change as a share of the range; infinite where the search ended
            before images followed, where there are no images of other classes, and for classes that were screened out.
        away: The length of a change that leads images to any label but their own; infinite where it is not shorter than
            all `lengths`, by `GAP` at least, or leads to few labels.
    """

    lengths: Tensor
    away: float = torch.inf

    @property
    def suspects(self) -> list[int]:
        """The classes that are hardly harder to reach than the easiest, by less than `GAP`, easiest first.

        `ALL_TO_ALL` alone where it is easier to lead images away from their own label than to any other. None where
        there are too many, as in many clean networks. Triggers that leave the labels alone, and some
        that are no change of fixed pixels, do not show here.
        """
        if self.away < torch.inf:
            return [ALL_TO_ALL]
        order = self.lengths.argsort()
        ordered = self.lengths[order]
        near = int((ordered < GAP * ordered[0]).sum()) if ordered[0].isfinite() else 0
        of_many = min(MOST_OF_MANY, int(OF_MANY * len(ordered)))
        most = max(1, min(max(MOST_SUSPECTS, of_many), len(ordered) // 3))
        return order[:near].tolist() if near <= most and near < len(ordered) else []

    @property
    def gap(self) -> float:
        """How many times longer the length towards the next class is than those towards the suspects; 1 without any."""
        if self.away < torch.inf:
            return torch.inf
        ordered = self.lengths.sort().values
        count = len(self.suspects)
        return float(ordered[count] / ordered[count - 1]) if count else 1.0

    def usable(self, targets: list[int]) -> Tensor:
        """The lengths [T] towards these targets, with a guess for classes that the search did not reach."""
        reached = self.lengths[self.lengths.isfinite()]
        longest = float(reached.max()) if len(reached) else 1.0
        return torch.where(self.all().isfinite(), self.all(), UNREACHED * longest)[targets]

    def all(self) -> Tensor:
        """The lengths towards each class, and `away`, where the index `ALL_TO_ALL` finds it: [K + 1]."""
        return torch.cat([self.lengths, self.lengths.new_tensor([self.away])])


def least_lengths(scene: Scene, draws: torch.Generator, *, among: list[int] | None = None) -> LeastLengths:
    """Lengthen one change for each class until the images follow it, and end a margin beyond the first class.

    A backdoor is a short way to its target for all images at once (Wang et al., "Neural Cleanse", S&P 2019). Classes
    that are reached are left alone from then on, so that only hard ones cost more. One with a target for each label is
    a short way from all labels at once; in other networks that is farther than to the easiest class.

    Args:
        scene: Network and images.
        draws: Draws the images.
        among: The classes to look at. Left out, all classes, of more than 16 those that `screened` picks, and
            all-to-all triggers.
    """
    lengths = torch.full((scene.classes,), torch.inf)
    classes = screened(scene, torch.arange(scene.classes), draws) if among is None else torch.tensor(among)
    lengths[classes] = _lengthened(scene, draws, classes, START, 1.0)[0]
    if among is not None:
        return LeastLengths(lengths)
    most, every = min(1.0, float(lengths.min())) / GAP, torch.tensor([ALL_TO_ALL])
    own = draws.clone_state()  # so that a search that finds nothing changes nothing
    away, changes = _lengthened(scene, own, every, SHORTER * most, most)
    found = bool(away.isfinite()) and _scatters(scene, changes[0], own)
    return LeastLengths(lengths, float(away) if found else torch.inf)


def _scatters(scene: Scene, change: Tensor, draws: torch.Generator) -> bool:
    """Whether images with the change are answered with as many labels as they have, by `SCATTERED` at least.

    Where classes are many and near each other, a change may lead most images to some few of them.
    """
    order = scene.drawn(draws, judge=True)
    answers = scene.answers(lambda x: (x + change).clamp(*scene.limits), order).argmax(1)
    labels = scene.answers(lambda x: x, order).argmax(1)
    return _perplexity(answers) >= SCATTERED * _perplexity(labels)


def _perplexity(labels: Tensor) -> float:
    """How many labels there are, rare ones counted for less."""
    shares = torch.bincount(labels).float() / len(labels)
    return float(torch.special.entr(shares).sum().exp())


def _lengthened(
    scene: Scene, draws: torch.Generator, targets: Tensor, start: float, most: float
) -> tuple[Tensor, Tensor]:
    """The lengths [T], up to about `most`, and the changes. Where one is reached at the first, all begin lower."""
    shape, device = scene.images.shape[1:], scene.images.device
    dtype = torch.promote_types(scene.images.dtype, torch.float32)
    changes = torch.zeros(len(targets), *shape, device=device, dtype=dtype)
    lengths, before = torch.full((len(targets),), torch.inf), torch.zeros(len(targets))
    open_, length = torch.arange(len(targets)), start
    while len(open_) and length <= min(most, GROWTH * BEYOND * float(lengths.min())):
        led_to = targets[open_].to(device)
        together = torch.full((len(open_),), length, device=device)
        changes[open_] = lead(scene, led_to, changes[open_], together, draws, steps=STEPS)
        rates = followed(scene, led_to, changes[open_], scene.drawn(draws, judge=True)).cpu()
        there = rates >= REACHED
        if length == start and bool(there.any()) and start > SHORTEST:
            return _lengthened(scene, draws, targets, SHORTER * start, most)
        # Between two lengths, by how far the rates are from what is asked.
        share = (REACHED - before[open_]) / (rates - before[open_])
        lengths[open_[there]] = (length * GROWTH ** (share.clamp(0, 1) - 1))[there]
        before[open_] = rates
        open_ = open_[~there & ~rates.isnan()]  # NaN: a class that all images are of
        length *= GROWTH
    return lengths, changes
