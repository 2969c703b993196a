"""The table at the end of a run, and its figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.table import Table

from bench.compare import MEMORY, OURS, Row

GROWTH = "growth"
COLORS = {OURS: "#0b6e4f", MEMORY: "#9aa0a6"}
OTHERS = ("#c8553d", "#e09f3e", "#5b7db1", "#8e6c8a")


def record(rows: Sequence[Row], path: Path) -> None:
    """Append to the results; what is there stays."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()]


def table(rows: Sequence[Row]) -> Table:
    """One line per way, grouped by case."""
    result = Table(
        title=f"{rows[0].environment['machine']}, torch {rows[0].environment['torch']}", title_justify="left"
    )
    for name in ("op", "case", "way"):
        result.add_column(name)
    for name in ("p20 ms", "p50 ms", "p80 ms", "GB/s", "of memory", "times ours", "extra MB", "compile s"):
        result.add_column(name, justify="right")
    group = None
    for row in rows:
        if group is not None and group != (row.op, row.case):
            result.add_section()
        same, group = group == (row.op, row.case), (row.op, row.case)
        result.add_row(
            "" if same else row.op,
            "" if same else f"{row.case}, {row.dtype}",
            row.way,
            *(f"{q * 1e3:.3f}" if q < 0.01 else f"{q * 1e3:.1f}" for q in (row.p20, row.p50, row.p80)),
            f"{row.bytes / row.p50 / 1e9:.1f}",
            "" if row.share is None else f"{row.share:.0%}",
            "" if row.way == MEMORY or row.times_ours is None else f"{row.times_ours:.2f}",
            "" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.0f}",
            "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}",
            style="bold" if row.way == OURS else "dim" if row.way == MEMORY else "",
        )
    return result


def figures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what the rows hold: shares of the memory's speed, and time against size."""
    drawn = []
    for op in dict.fromkeys(row.op for row in rows if row.share is not None and row.op != GROWTH):
        drawn.append(_bars([row for row in rows if row.op == op and row.share is not None], op, folder))
    if lines := growing(rows):
        drawn.append(_growth(lines, folder))
    return drawn


def _bars(rows: Sequence[Row], op: str, folder: Path) -> Path:
    cases = list(dict.fromkeys(row.case for row in rows))
    ways = [way for way in dict.fromkeys(row.way for row in rows) if way != MEMORY]
    colors = dict(zip([way for way in ways if way != OURS], OTHERS, strict=False)) | COLORS
    figure, axes = plt.subplots(figsize=(1.8 + 1.9 * len(cases), 3.6), layout="constrained")
    width = 0.8 / len(ways)
    for i, way in enumerate(ways):
        shares = {row.case: row.share or 0 for row in rows if row.way == way}
        places = [j + (i - (len(ways) - 1) / 2) * width for j, case in enumerate(cases) if case in shares]
        bars = axes.bar(places, [100 * share for share in shares.values()], width * 0.92, label=way, color=colors[way])
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1, color="#444444")
    axes.axhline(100, color=COLORS[MEMORY], linewidth=1, linestyle="--")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("share of the memory's speed, %")
    axes.set_title(f"{op}: {rows[0].environment['machine']}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, folder / f"share-{op.replace(' ', '-').replace('_', '-').strip('-')}.png")


def growing(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Millions of parameters and seconds, by what was timed."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.op == GROWTH and row.way == OURS:
            name, millions = row.case.removesuffix(" M").rsplit(", ", 1)
            lines.setdefault(name, []).append((int(millions), row.p50))
    return lines


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """The e of time = c * size^e, by least squares on the logarithms."""
    logs = [(math.log(size), math.log(seconds)) for size, seconds in points]
    x, y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)


def _growth(lines: dict[str, list[tuple[int, float]]], folder: Path) -> Path:
    figure, axes = plt.subplots(figsize=(5.4, 3.8), layout="constrained")
    for (name, points), color in zip(lines.items(), (COLORS[OURS], *OTHERS), strict=False):
        label = f"{name}, size^{exponent(points):.2f}"
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=label, markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel("seconds")
    axes.set_title("Time of a call against the size of the model, bfloat16", fontsize=9, loc="left")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, folder / "growth.png")


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
