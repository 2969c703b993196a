"""Batch statistics: does the rate come back when the BatchNorm statistics are estimated anew?"""

from __future__ import annotations

from dataclasses import dataclass

from bdfast.audits.base import AuditMethod, Finding
from bdfast.audits.case import Case
from bdfast.audits.rates import Figures, rises, share
from bdfast.training import Run
from bdfast.training.batchnorm import batchnorms


@dataclass(frozen=True)
class BatchStatisticsFinding(Finding):
    """The networks as they are, and with statistics that were estimated anew.

    Attributes:
        layers: How many layers of the purified network keep running statistics.
        before: The original network.
        before_recalibrated: With new statistics.
        after: The purified network.
        after_recalibrated: With new statistics.
        clean_model_recalibrated: The clean network with new statistics; None without one.
    """

    layers: int
    before: Figures
    before_recalibrated: Figures
    after: Figures
    after_recalibrated: Figures
    clean_model_recalibrated: Figures | None = None

    @property
    def p_rate(self) -> float | None:
        """The rate of the purified network with new statistics."""
        return self.after_recalibrated.rate

    @property
    def by_itself(self) -> float:
        """What the clean network shows with new statistics."""
        control = self.clean_model_recalibrated
        return 0.0 if control is None else control.rate or 0.0

    @property
    def hidden(self) -> bool:
        """Whether stale statistics hide a backdoor that is still in the weights."""
        return rises(self.p_rate, self.after.rate) and rises(self.p_rate, self.by_itself)

    def sentences(self, after: Figures) -> list[str]:
        """See `Finding`."""
        if not self.layers:
            return ["The purified network keeps no running statistics: there is nothing to estimate anew."]
        old, new = self.after, self.after_recalibrated
        said = [f"With BatchNorm statistics estimated anew, ACC goes from {share(old.acc)} to {share(new.acc)}."]
        if new.rate is not None:
            said.append(f"The {self.rate_name} goes from {share(old.rate)} to {share(new.rate)} then.")
            if self.clean_model_recalibrated is not None:
                said.append(f"A clean network has {share(self.by_itself)} with new statistics.")
        if self.hidden:
            said.append("It comes back: stale statistics hid a backdoor that is still in the weights.")
        return said


@dataclass(frozen=True)
class BatchStatisticsAudit(AuditMethod):
    """Estimate the BatchNorm statistics of all networks anew on clean images, and measure again. Ours.

    No weight moves, so that a rate that comes back was never removed: changed weights make the running statistics
    stale, and a network with stale statistics may miss its trigger as it misses everything faint.
    """

    def run(self, case: Case, run: Run) -> BatchStatisticsFinding:
        """See `AuditMethod`."""
        return BatchStatisticsFinding(
            case.rate_name,
            len(batchnorms(case.after)),
            case.figures(case.before),
            case.figures(case.before, recalibrated=True),
            case.figures(case.after),
            case.figures(case.after, recalibrated=True),
            None if case.clean_model is None else case.figures(case.clean_model, recalibrated=True),
        )
