"""Figures of the loss landscape; see `bdfast.audits.landscape`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bdfast.report.figures import AFTER, BEFORE, INK, MUTED, WIDE, percent, styled

if TYPE_CHECKING:
    from bdfast.audits.landscape import Landscape


@styled
def sharpness(landscape: Landscape, *, width: float = WIDE) -> Figure:
    """Loss against the distance from the weights, along the gradient: steep is sharp.

    Args:
        landscape: Radii and losses.
        width: Inches.
    """
    figure = Figure(figsize=(width, 2.6), layout="constrained")
    axes = figure.subplots()
    rows = zip(("before", "after"), (BEFORE, AFTER), landscape.losses, strict=True)
    _lines(axes, landscape.radii, [(f"{name} ({losses[-1]:.2g})", colour, losses) for name, colour, losses in rows])
    axes.set(ylim=(0, None))
    axes.set_xlabel("distance from the weights, along the gradient", loc="left")
    axes.set_ylabel("loss on clean images")
    return figure


@styled
def path(landscape: Landscape, *, width: float = WIDE) -> Figure:
    """ACC and ASR on the straight line from the original network to the purified one.

    Args:
        landscape: The path.
        width: Inches.
    """
    figure = Figure(figsize=(width, 2.8), layout="constrained")
    axes = figure.subplots()
    ts = [t for t, _ in landscape.path]
    rows = []
    for label, colour, key in (("ACC", INK, "acc"), ("ASR", BEFORE, "asr")):
        values = [getattr(metrics, key) for _, metrics in landscape.path]
        if None not in values:
            rows.append((f"{label} {percent(values[-1])}", colour, [100 * value for value in values]))
    _lines(axes, ts, rows)
    axes.set(ylim=(0, 100), yticks=range(0, 101, 25), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("0: original; 1: purified", loc="left")
    axes.set_ylabel("share of images (%)")
    return figure


def _lines(axes: Axes, xs: Sequence[float], rows: Sequence[tuple[str, str, Sequence[float]]]) -> None:
    """Lines with their labels at the end; where these are close, one goes up and one down."""
    ends = [ys[-1] for _, _, ys in rows]
    apart = 6 if max(ends) - min(ends) < 0.1 * max(max(ys) for _, _, ys in rows) else 0
    for label, colour, ys in rows:
        axes.plot(xs, ys, color=colour, linewidth=1.8, marker="o", markersize=3.5, clip_on=False)
        put: dict[str, Any] = {"textcoords": "offset points", "va": "center", "weight": "bold", "color": colour}
        axes.annotate(
            label, (xs[-1], ys[-1]), (7, apart if ys[-1] == max(ends) else -apart), annotation_clip=False, **put
        )
    axes.grid(axis="y")
    axes.tick_params(colors=MUTED)
    axes.spines["left"].set_visible(False)
