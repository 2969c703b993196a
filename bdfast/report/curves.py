"""What the figures draw of a history: accuracy by epoch, and the stages that were tried."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bdfast.training import Epoch, History, Probe


def known(value: Any) -> float | None:
    """`value` as a finite float, or None: metrics may be missing and runs that diverge record NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Part:
    """A piece of a curve.

    Attributes:
        rate: Learning rate, where several were tried in stages.
        points: (epoch, accuracy); the epochs go on from those of the part before.
        kept: Whether the model went on from here; False for a stage that was undone.
    """

    rate: str | None
    points: list[tuple[float, float]]
    kept: bool


def curve(history: History, stage: str) -> list[Part]:
    """The epochs of a stage; its rounds ("fine-tune at 0.01, round 2") follow one another, a part for each rate."""
    rounds: dict[tuple[str | None, str], list[Epoch]] = {}
    for row in history:
        if isinstance(row, Epoch) and (row.stage == stage or row.stage.startswith((f"{stage} at ", f"{stage}, "))):
            rate = row.stage.removeprefix(f"{stage} at ").split(",")[0] if " at " in row.stage else None
            rounds.setdefault((rate, row.stage), []).append(row)
    kept = _kept(history)
    parts: list[Part] = []
    before = 0.0
    for (rate, _), rows in rounds.items():
        points = [(before + row.epoch, row.accuracy) for row in rows if known(row.accuracy) is not None]
        if parts and parts[-1].rate == rate:
            parts[-1].points.extend(points)
        elif points:
            parts.append(Part(rate, points, kept is None or rate is None or rate in kept))
        before = points[-1][0] if points else before
    return parts


def end(parts: list[Part]) -> float | None:
    """The accuracy that the model went on with; None where all was undone or nothing is known."""
    values = [part.points[-1][1] for part in parts if part.kept]
    return values[-1] if values else None


def _kept(history: History) -> set[str] | None:
    """The rates up to the one that was chosen; None where there was no choice."""
    probes = [row for row in history if isinstance(row, Probe)]
    if not probes:
        return None
    chosen = [index for index, row in enumerate(probes) if row.chosen]
    return {f"{row.value:g}" for row in probes[: chosen[-1] + 1 if chosen else 0]}


def stages(history: History) -> list[Probe]:
    """The stages that were judged, in order; those without a finite accuracy are left out."""
    return [row for row in history if isinstance(row, Probe) and known(row.accuracy) is not None]
