"""What one record of a grid says, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence

from bdfast.matrix.tables import DASH, Record


def attack_of(record: Record) -> str:
    """Its name with the target; the poison rate has a column of its own."""
    attack = record["attack"]
    if attack["kind"] == "none":
        return "none"
    options = attack["options"]
    return f"{attack['kind']} to {'all' if options.get('targets') else options['target']}"


def loss_of(record: Record) -> float:
    """Points of ACC, as a fraction."""
    return record["before"]["acc"] - record["after"]["acc"]


def percent(value: float | None) -> str:
    """A fraction, without its sign where it is zero."""
    return DASH if value is None else f"{100 * value:.1f}".replace("-0.0", "0.0")


def spread(values: Sequence[float]) -> str:
    """Mean (least to greatest)."""
    if len(values) < 2:
        return percent(values[0]) if values else DASH
    return f"{percent(sum(values) / len(values))} ({percent(min(values))} to {percent(max(values))})"
