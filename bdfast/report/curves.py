"""What the figures draw of a history: accuracy by epoch, and the stages that were tried."""

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
    """(epoch, accuracy) of the epochs of a stage; its parts ("fine-tune at 0.01, round 2") follow one another."""
    rounds: dict[str, list[Epoch]] = {}
    for row in history:
        if isinstance(row, Epoch) and (row.stage == stage or row.stage.startswith((f"{stage} at ", f"{stage}, "))):
            rounds.setdefault(row.stage, []).append(row)
    points: list[tuple[float, float]] = []
    for rows in rounds.values():
        before = points[-1][0] if points else 0
        points += [(before + row.epoch, row.accuracy) for row in rows if known(row.accuracy) is not None]
    return points


def stages(history: History) -> list[Probe]:
    """The stages that were judged, in order; those without a finite accuracy are left out."""
    return [row for row in history if isinstance(row, Probe) and known(row.accuracy) is not None]
