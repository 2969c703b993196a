"""Records as a heat map: one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2

from bdfast._version import __version__
from bdfast.matrix.tables import BY, Record, Spread, notes, tables

# White for a backdoor that is gone; for one that works, the vermilion of the report, so much lighter that small dark
# text on it has a contrast of 4.5 at least.
LOW, HIGH = (255, 255, 255), (232, 120, 46)
LEGEND = (0, 10, 25, 50, 75, 100)


def heat_map(records: Sequence[Record], by: Sequence[str] = BY, *, title: str = "Defenses against attacks") -> str:
    """An HTML page with one cell a row and column, coloured by its ASR after the defense.

    The page needs nothing but itself: no network, no script, no file beside it.

    Args:
        records: From `read_records`.
        by: As for `bdfast.matrix.tables.tables`.
        title: Heading of the page.

    Raises:
        ValueError: `by` has an unknown key, or less than two.
    """
    asr, loss = tables(records, by)
    context = {
        "version": __version__,
        "title": title,
        "notes": notes(records),
        "heads": asr.heads,
        "columns": asr.columns,
        "rows": [
            {
                "names": names,
                "cells": [_cell(a, b, first=index == 0) for index, (a, b) in enumerate(zip(x, y, strict=True))],
            }
            for (names, x), (_, y) in zip(asr.rows, loss.rows, strict=True)
        ],
        "legend": [{"value": value, "style": colours(value)} for value in LEGEND],
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = (resources.files(__package__) / "heat_map.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(context)


def colours(percent: float) -> str:
    """The style of a cell with this ASR: its background, and text that can be read on it."""
    share = min(max(percent / 100, 0.0), 1.0) ** 0.7  # the steps between 0 and 20 % are what one looks for
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(LOW, HIGH, strict=True))
    return f"background: rgb({red}, {green}, {blue})"


def _cell(asr: Spread, loss: Spread, *, first: bool) -> dict[str, Any]:
    """What the template shows; `first` is the column of the network before any defense."""
    mean = asr.mean
    accuracy = loss.mean
    spread = ""
    if len(asr.values) > 1:
        spread = f"{min(asr.values):.1f} to {max(asr.values):.1f}"
    count = max(len(asr.values), len(loss.values))
    return {
        "style": "" if mean is None else colours(mean),
        "asr": "" if mean is None else f"{mean:.1f}",
        "spread": spread,
        "accuracy": "" if accuracy is None else f"ACC {accuracy:.1f}" if first else f"ACC {_change(-accuracy)}",
        "count": f"n={count}" if count else "",
        "failed": asr.failed,
    }


def _change(points: float) -> str:
    text = f"{points:+.1f}"
    return "0.0" if text in ("-0.0", "+0.0") else text.replace("-", "\u2212")
