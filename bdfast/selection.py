"""Choosing a method's strength from clean data alone.

Too weak a setting leaves the backdoor, too strong a one costs accuracy, and published code settles it by looking at
triggered test data, which a defender does not have. The rule here is the same for every method: the strongest setting
whose clean accuracy, on images that the probe was not tuned on and with BatchNorm statistics recalibrated, stays within
a budget of that of the model handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A chosen strength and the held-out accuracy of every setting that was probed on the way."""

    strength: float
    probes: dict[float, float]
    floor: float


def strongest_within(
    ladder: Sequence[float], probe: Callable[[float], float], *, baseline: float, max_accuracy_drop: float
) -> Choice:
    """The largest strength whose held-out accuracy is at least `baseline - max_accuracy_drop`.

    Accuracy falls along the ladder, so a bisection finds it in log2(len(ladder)) probes. Where not even the weakest
    setting stays within the budget, the weakest is taken.

    Args:
        ladder: Strengths, weak to strong.
        probe: Held-out accuracy of the model after a short purification of that strength.
        baseline: Held-out accuracy of the model handed in.
        max_accuracy_drop: The budget, as a fraction.
    """
    floor = baseline - max_accuracy_drop
    probes: dict[float, float] = {}
    low, high = (
        0,
        len(ladder),
    )  # everything below `low` is within the budget, everything from `high` on is not
    while low < high:
        middle = (low + high) // 2
        accuracy = probes[ladder[middle]] = probe(ladder[middle])
        if accuracy >= floor:
            low = middle + 1
        else:
            high = middle
    return Choice(ladder[max(low - 1, 0)], probes, floor)
