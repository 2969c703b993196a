"""Choosing a method's strength from clean data alone.

Too weak a setting leaves the backdoor, too strong a one costs accuracy, and published code settles it by looking at
triggered test data, which a defender does not have. The rule here is the same for every method: the strongest setting
whose clean accuracy, on images that the probe was not tuned on and with BatchNorm statistics recalibrated, stays within
a budget of that of the weakest setting.

The budget counts from the weakest setting and not from the model handed in, since a short fine-tuning on a part of the
clean set costs accuracy whatever the strength, and the full one gives it back (docs/choosing-strength.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A chosen strength, the held-out accuracy of every setting that was probed, and the least that was accepted."""

    strength: float
    probes: dict[float, float]
    floor: float


def strongest_within(ladder: Sequence[float], probe: Callable[[float], float], *, max_accuracy_drop: float) -> Choice:
    """The largest strength whose held-out accuracy is at least that of the weakest less `max_accuracy_drop`.

    Accuracy falls along the ladder, so a bisection finds it in about log2(len(ladder)) probes after the first.

    Args:
        ladder: Strengths, weak to strong.
        probe: Held-out accuracy of the model after a short purification of that strength.
        max_accuracy_drop: The budget, as a fraction.
    """
    probes = {ladder[0]: probe(ladder[0])}
    floor = probes[ladder[0]] - max_accuracy_drop
    low, high = 1, len(ladder)  # everything below `low` is within the budget, everything from `high` on is not
    while low < high:
        middle = (low + high) // 2
        accuracy = probes[ladder[middle]] = probe(ladder[middle])
        if accuracy >= floor:
            low = middle + 1
        else:
            high = middle
    return Choice(ladder[low - 1], probes, floor)
