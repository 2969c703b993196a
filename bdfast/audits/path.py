"""Path: ACC and rate on the straight line between the original network and the purified one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from bdfast.audits.base import AuditMethod, Finding
from bdfast.audits.case import Case
from bdfast.audits.landscape import Statistics, metrics_along_path
from bdfast.audits.rates import Figures, share
from bdfast.training import Run

CONVENTION = "t = 0 is the original network, t = 1 the purified one"

WORKS = 0.5
"""The rate from which on the backdoor counts as back on the line."""


@dataclass(frozen=True)
class PathFinding(Finding):
    """What lies between the two networks.

    Attributes:
        bn: How the BatchNorm statistics of a network in between were had.
        curve: (t, what the network there shows).
        barrier: The error barrier: how far ACC falls below the straight line between the ACC of both ends, at most.
        nearest: How far from the purified network, as a share of the way, the rate is `WORKS` first; None: nowhere.
        convention: Which end is which.
    """

    bn: str
    curve: tuple[tuple[float, Figures], ...]
    barrier: float
    nearest: float | None
    convention: str = CONVENTION

    def sentences(self, after: Figures) -> list[str]:
        """See `Finding`."""
        said = [f"On the line between the networks ACC falls by {share(self.barrier)} at most (the error barrier)."]
        if self.nearest is not None:
            said.append(
                f"Going back from the purified network, the {self.rate_name} is {share(WORKS)} or more after "
                f"{share(self.nearest)} of the way."
            )
        elif self.curve[0][1].rate is not None:
            said.append(f"The {self.rate_name} is below {share(WORKS)} on the whole line.")
        return said


@dataclass(frozen=True)
class PathAudit(AuditMethod):
    """Linear mode connectivity: the networks (1 - t) before + t after (Min et al., NeurIPS 2024, arXiv 2410.09838).

    A purified network from which a short straight way leads back to the backdoor has not gone far. The paper releases
    no script for it, and neither which end is t = 0 nor what is done with BatchNorm is known: here t = 0 is the
    original network, and the statistics are estimated anew at every point, both ends included.

    Attributes:
        points: How many t, both ends included.
        bn: "recalibrate" or "interpolate"; see `bdfast.audits.landscape.metrics_along_path`.
    """

    paper: ClassVar[str] = "Min et al., NeurIPS 2024, arXiv 2410.09838"

    points: int = 11
    bn: Statistics = "recalibrate"

    def __post_init__(self) -> None:
        self.check_at_least("points", 2)
        if self.bn not in get_args(Statistics):
            raise ValueError(f"bn: expected recalibrate or interpolate, got {self.bn!r}; recalibrate is the default.")

    def lacks(self, case: Case) -> str | None:
        """See `AuditMethod`."""
        shapes = [{name: x.shape for name, x in model.state_dict().items()} for model in (case.before, case.after)]
        return None if shapes[0] == shapes[1] else "two networks of the same architecture"

    def run(self, case: Case, run: Run) -> PathFinding:
        """See `AuditMethod`."""
        rows = metrics_along_path(
            case.before, case.after, case.evaluator, recalibrate_on=case.clean, points=self.points, bn=self.bn
        )
        curve = tuple((t, Figures(metrics.acc, metrics.asr)) for t, metrics in rows)
        return PathFinding(case.rate_name, self.bn, curve, barrier(curve), nearest(curve))


def barrier(curve: tuple[tuple[float, Figures], ...]) -> float:
    """The error barrier: max over t of (1 - t) ACC(0) + t ACC(1) - ACC(t), which is 0 at both ends."""
    start, end = curve[0][1].acc, curve[-1][1].acc
    return max([0.0, *((1 - t) * start + t * end - figures.acc for t, figures in curve[1:-1])])


def nearest(curve: tuple[tuple[float, Figures], ...]) -> float | None:
    """1 - t for the greatest t at which the rate is `WORKS` or more; None where there is no such t."""
    ts = [t for t, figures in curve if figures.rate is not None and figures.rate >= WORKS]
    return 1 - max(ts) if ts else None
