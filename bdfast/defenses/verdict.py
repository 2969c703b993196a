"""What a purification says of its own success, from clean images alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bdfast.inversion.scene import ALL_TO_ALL
from bdfast.selection import Choice, Judge

REMOVED, REDUCED = 0.05, 0.15
"""Residuals up to which a backdoor counts as removed, and below which it counts as reduced."""

Status = Literal["removed", "reduced", "not removed", "nothing found"]


@dataclass(frozen=True)
class Verdict:
    """Whether the backdoor is gone, as far as surrogate triggers tell.

    Surrogates are triggers that were guessed from the given model and clean images. The residual is how often they
    still lead held-out clean images to their class, less how often those go there by themselves. "nothing found" does
    not mean that there is no backdoor: triggers that leave the labels alone, and some that are no change of fixed
    pixels, leave no class that stands out.

    Attributes:
        targets: Suspected target labels, the most suspicious first; (-1,) for a trigger with a target for each label.
        residual_before: Of the given model, in [0, 1]; 0 where nothing was found.
        residual_after: Of the purified model.
        accuracy_before: Of the given model on the held-out images.
        accuracy_after: Of the purified one.
        held_out: How many held-out images there are.
        clear: Whether the targets are clearly easier to reach than all other classes, by small patches too. Else
            "nothing found": in clean networks some class is the easiest, too.
    """

    targets: tuple[int, ...]
    residual_before: float
    residual_after: float
    accuracy_before: float
    accuracy_after: float
    held_out: int
    clear: bool = True

    @property
    def status(self) -> Status:
        """In one phrase."""
        if not self.targets or not self.clear:
            return "nothing found"
        if self.residual_after <= REMOVED:
            return "removed"
        return "reduced" if self.residual_after < REDUCED else "not removed"

    def as_json(self) -> dict[str, Any]:
        """For a file: the status, and every field."""
        return {"status": self.status, **asdict(self)}

    def __str__(self) -> str:
        """In one line."""
        accuracy = f"held-out accuracy {self.accuracy_before:.1%} -> {self.accuracy_after:.1%}"
        if not self.targets:
            return f"nothing found: no class is easier to reach than all others; {accuracy}"
        labels = ", ".join(map(str, self.targets))
        residual = f"residual {self.residual_before:.2f} -> {self.residual_after:.2f}"
        if not self.clear:
            return f"nothing found: no class stands out clearly; of the easiest, {labels}: {residual}; {accuracy}"
        found = "all-to-all" if ALL_TO_ALL in self.targets else f"target label {labels}"
        return f"{self.status}: {found}, {residual}, {accuracy}"


def verdict_of(judge: Judge, choice: Choice) -> Verdict | None:
    """The verdict on the step that was taken; None where there are no surrogate triggers."""
    if judge.surrogates is None:
        return None
    before, after = judge.before, choice.reached
    return Verdict(
        tuple(judge.targets),
        before.residual,
        after.residual,
        before.accuracy,
        after.accuracy,
        len(before.right),
        clear=judge.surrogates.clear,
    )


def suspicion(judge: Judge) -> dict[str, Any]:
    """What the search for surrogate triggers found, for `Outcome.found`."""
    if judge.surrogates is None:
        return {}
    *lengths, away = (x if x < math.inf else None for x in judge.surrogates.lengths.all().tolist())
    return {"targets": judge.targets, "least_lengths": lengths, "all_to_all_length": away}
