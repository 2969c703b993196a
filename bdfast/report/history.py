"""Reads the rows that a purification records, of which any may lack a key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

History: TypeAlias = Sequence[Mapping[str, Any]]


class Probe(NamedTuple):
    """A value of the option that is the method's strength, and the held-out clean accuracy that it left."""

    value: float
    accuracy: float
    kept: bool
    chosen: bool
    option: str


def known(value: Any) -> float | None:
    """`value` as a finite float, or None: metrics may be missing and runs that diverge record NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def curve(history: History, stage: str) -> list[tuple[float, float]]:
    """(epoch, accuracy) of the rows of a stage that have an accuracy; a missing epoch counts up from 0.

    Rounds of a stage ("fine-tune 2") follow one another.
    """
    rounds: dict[str, list[Mapping[str, Any]]] = {}
    for row in history:
        name = str(row.get("stage", ""))
        if name == stage or name.rpartition(" ")[0] == stage:
            rounds.setdefault(name, []).append(row)
    points: list[tuple[float, float]] = []
    for rows in rounds.values():
        before = points[-1][0] if points else 0
        for i, row in enumerate(rows):
            epoch, accuracy = known(row.get("epoch", i)), known(row.get("accuracy"))
            if epoch is not None and accuracy is not None:
                points.append((before + epoch, accuracy))
    return points


def probes(history: History) -> list[Probe]:
    """The complete probe rows, weak to strong."""
    rows = [row for row in history if row.get("stage") == "probe"]
    tried = ((known(row.get("value")), known(row.get("accuracy")), row) for row in rows)
    return sorted(
        Probe(value, accuracy, bool(row.get("kept")), bool(row.get("chosen")), str(row.get("option", "strength")))
        for value, accuracy, row in tried
        if value is not None and accuracy is not None
    )


def lowest_accepted(history: History, options: Mapping[str, Any]) -> float | None:
    """The accuracy that a probe must keep: that of the weakest one, less `max_accuracy_drop`."""
    tried = probes(history)
    drop = known(options.get("max_accuracy_drop"))
    return tried[0].accuracy - drop if tried and drop is not None else None
