"""Reads the rows that a purification records, of which any may lack a key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

History: TypeAlias = Sequence[Mapping[str, Any]]


class Probe(NamedTuple):
    """A strength n that was tried, and the held-out clean accuracy that it left."""

    n: float
    accuracy: float
    kept: bool
    chosen: bool


def known(value: Any) -> float | None:
    """`value` as a finite float, or None: metrics may be missing and runs that diverge record NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def curve(history: History, stage: str) -> list[tuple[float, float]]:
    """(epoch, accuracy) of the rows of a stage that have an accuracy; a missing epoch counts up from 0."""
    rows = [row for row in history if row.get("stage") == stage]
    points = ((known(row.get("epoch", i)), known(row.get("accuracy"))) for i, row in enumerate(rows))
    return [(epoch, accuracy) for epoch, accuracy in points if epoch is not None and accuracy is not None]


def probes(history: History) -> list[Probe]:
    """The complete probe rows, weak to strong."""
    rows = [row for row in history if row.get("stage") == "probe"]
    tried = ((known(row.get("n")), known(row.get("accuracy")), row) for row in rows)
    return sorted(
        Probe(n, accuracy, bool(row.get("kept")), bool(row.get("chosen")))
        for n, accuracy, row in tried
        if n is not None and accuracy is not None
    )


def lowest_accepted(history: History, options: Mapping[str, Any]) -> float | None:
    """The accuracy that a probe must keep: that of the weakest one, less `max_accuracy_drop`."""
    tried = probes(history)
    drop = known(options.get("max_accuracy_drop"))
    return tried[0].accuracy - drop if tried and drop is not None else None
