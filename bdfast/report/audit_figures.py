"""The audit of a purified network: its courses as a figure, its rates as a table; see `bdfast.audit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from bdfast.report.figures import BEFORE, INK, MUTED, WIDE, percent, styled

if TYPE_CHECKING:
    from bdfast.audits import Audit

PANELS = {
    "path": "between the networks (0: original; 1: purified)",
    "retuning": "updates of retuning",
    "relearning": "updates of poisoned fine-tuning",
}
"""The audits with a course, and what it is over."""

_NONE = "\u2013"


def panels(audit: Audit) -> list[str]:
    """Which courses there are to draw."""
    return [name for name in PANELS if name in audit.curves]


@styled
def courses(audit: Audit, *, width: float = WIDE) -> Figure:
    """ACC and the rate of the trigger along each course, one below the other.

    Args:
        audit: One with a course at least.
        width: Inches.
    """
    shown = panels(audit)
    figure = Figure(figsize=(width, 0.3 + 1.7 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), squeeze=False)
    for axes, name in zip(grid[:, 0], shown, strict=True):
        curve = audit.curves[name]
        for label, colour, values in (
            ("ACC", INK, [figures.acc for _, figures in curve]),
            (audit.rate_name, BEFORE, [figures.rate for _, figures in curve]),
        ):
            known = [100 * value for value in values if value is not None]
            if len(known) == len(curve):
                end = f"{label} ({percent(known[-1] / 100)} at the end)"
                ts = [x for x, _ in curve]
                axes.plot(ts, known, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=end)
        axes.set(ylim=(-4, 104), yticks=range(0, 101, 50))
        axes.set_xlabel(PANELS[name], loc="left")
        axes.set_ylabel("images (%)")
        axes.legend(loc="center left", bbox_to_anchor=(0, 0.5), frameon=False)
        axes.grid(axis="y")
        axes.tick_params(colors=MUTED)
        axes.spines["left"].set_visible(False)
    return figure


def table(audit: Audit) -> list[dict[str, str]]:
    """A row for each audit that attacks the purified network: the rate as it is, after it, and of its control."""
    return [
        {
            "name": name.replace("_", " "),
            "before": _NONE if audit.o_rate is None else percent(audit.o_rate),
            "after": percent(rate),
            "control": percent(audit.results[name].by_itself) if audit.results[name].by_itself else _NONE,
            "tone": "worse" if name in audit.back else "",
        }
        for name, rate in audit.p_rates.items()
    ]
