"""What the figures draw of a history: accuracy by epoch, and the probes of a strength."""

from __future__ import annotations

import math
from typing import Any

from bdfast.training import Epoch, History, Probe


def known(value: Any) -> float | None:
    """`value` as a finite float, or None: metrics may be missing and runs that diverge record NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def curve(history: History, stage: str) -> list[tuple[float, float]]:
    """(epoch, accuracy) of the epochs of a stage; rounds of a stage ("fine-tune 2") follow one another."""
    rounds: dict[str, list[Epoch]] = {}
    for row in history:
        if isinstance(row, Epoch) and (row.stage == stage or row.stage.rpartition(" ")[0] == stage):
            rounds.setdefault(row.stage, []).append(row)
    points: list[tuple[float, float]] = []
    for rows in rounds.values():
        before = points[-1][0] if points else 0
        points += [(before + row.epoch, row.accuracy) for row in rows if known(row.accuracy) is not None]
    return points


def probes(history: History) -> list[Probe]:
    """The probes with a finite accuracy, weak to strong."""
    tried = [row for row in history if isinstance(row, Probe) and known(row.accuracy) is not None]
    return sorted(tried, key=lambda probe: probe.value)
