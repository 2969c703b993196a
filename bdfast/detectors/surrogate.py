"""Detection by surrogate triggers: a class that is much easier to reach than all others, by small patches too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from bdfast.data.batches import Batches
from bdfast.detectors.base import Detector, Finding
from bdfast.inversion.least_length import BEYOND, LeastLengths
from bdfast.inversion.scene import ALL_TO_ALL, scene_of
from bdfast.inversion.surrogates import Surrogates, find_surrogates
from bdfast.inversion.universal import GROWTH
from bdfast.training import Run
from bdfast.training.seeds import derived_seed

FARTHEST = BEYOND * GROWTH
"""Beyond this factor the search does not look for a next class."""

WITHOUT_PATCH = 0.5
"""What a gap counts where no patch leads to the class, beside 1.5 where all images follow a patch."""


@dataclass(frozen=True)
class SurrogateDetector(Detector):
    """The search that `purify` judges itself by, as a detector; ours.

    For every class it lengthens one change for all images until they follow it, as a backdoor is a short way to its
    target for all of them (Wang et al., "Neural Cleanse", S&P 2019), and one that leads images away from every label,
    for triggers with a target for each. The score is the logarithm of how many times farther the next class is, times
    what small patches towards the suspect reach: (1/2 + rate). Of several suspects, which differ little, the next class
    is the one after as many as patches have left.

    Triggers that leave the labels of the training images alone, and some that are no change of fixed pixels, do not
    show.
    """

    paper: ClassVar[str] = "ours, after Wang et al., Neural Cleanse, S&P 2019"
    scored_by: ClassVar[str] = (
        "log of the distance to the next class over that to the suspect, times (1/2 + patch rate)"
    )

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Finding:
        """See `Detector.run`."""
        draws = torch.Generator().manual_seed(derived_seed(run.seed, "surrogates"))
        with scene_of(model, clean, run) as scene:
            found = find_surrogates(scene, draws)
            lengths = found.lengths
            if not found.targets and bool(lengths.lengths.isfinite().any()):
                # A class that is only a little easier than the next has a score, too.
                found = find_surrogates(scene, draws, targets=[int(lengths.lengths.argmin())])
            rates = found.rates(scene)
        patches = [rate for trigger, rate in zip(found.triggers, rates, strict=True) if trigger.weight is not None]
        reached = max((rate for rate in patches if rate == rate), default=0.0)
        gap = 1.0 if not found.targets else min(FARTHEST, _gap(lengths, found))
        shown = [length if math.isfinite(length) else math.nan for length in lengths.lengths.tolist()]
        towards = [(rate, trigger) for trigger, rate in zip(found.triggers, rates, strict=True) if rate == rate]
        own = [pair for pair in towards if pair[1].target == found.targets[0]]
        # A patch is easier to look at than a dense change, and of several the one that works best.
        best = max(own, key=lambda pair: (pair[1].weight is not None, pair[0]))[1] if own else None
        return Finding(
            score=math.log(gap) * (WITHOUT_PATCH + reached),
            targets=tuple(found.targets),
            evidence={"least length (share of the range)": shown},
            trigger=None if best is None else best.paint.detach().cpu(),
            mask=None if best is None or best.weight is None else best.weight.detach().cpu(),
            notes=(f"The next class is {gap:.2f} times as far, patches towards the suspect lead {reached:.0%} there.",),
        )


def _gap(lengths: LeastLengths, found: Surrogates) -> float:
    """How many times farther the next class is than the suspects; for a target for each label, than that change."""
    ordered = lengths.lengths.sort().values.tolist()
    if ALL_TO_ALL in found.targets:
        return ordered[0] / lengths.away
    count = len(found.targets)
    return ordered[count] / ordered[count - 1] if count < len(ordered) else 1.0
