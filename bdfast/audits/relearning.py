"""Relearning: how many updates on poisoned images it takes until the backdoor works again."""

from __future__ import annotations

from dataclasses import dataclass

from bdfast.audits.base import AuditMethod, Finding
from bdfast.audits.case import Case
from bdfast.audits.poisoned_training import Curve, trained_copy
from bdfast.audits.rates import Figures, share
from bdfast.audits.retuning import at_most
from bdfast.audits.triggers import Poisoned
from bdfast.training import Run
from bdfast.training.seeds import derived_seed


@dataclass(frozen=True)
class RelearningFinding(Finding):
    """How fast two networks learn the trigger.

    Attributes:
        until: The rate that was waited for.
        budget: Most updates.
        updates: After how many the purified network had it, within `every` of them; None: never within the budget.
        curve: What it showed on the way.
        beside: Which network it is compared with: "clean_model" or "before".
        beside_updates: After how many that one had it.
        beside_curve: What that one showed.
    """

    until: float
    budget: int
    updates: int | None
    curve: Curve
    beside: str
    beside_updates: int | None
    beside_curve: Curve

    def sentences(self, after: Figures) -> list[str]:
        """See `Finding`."""
        other = "a clean network" if self.beside == "clean_model" else "the network as it was handed in"
        return [
            f"Poisoned fine-tuning brings the {self.rate_name} to {share(self.until)}: that of the purified network "
            f"{self._when(self.updates)}, that of {other} {self._when(self.beside_updates)}."
        ]

    def _when(self, updates: int | None) -> str:
        return f"never within {self.budget} updates" if updates is None else f"after {updates} updates"


@dataclass(frozen=True)
class RelearningAudit(AuditMethod):
    """Count the updates of poisoned fine-tuning until the trigger works on half of the images. Ours.

    Beside a clean network, if there is one: one that has lost its backdoor learns it no faster than that. Otherwise
    beside the original network, which most often has it after 0 updates and so is only the other end of the scale.

    Attributes:
        poison_rate: Share of the images that are poisoned.
        until: The rate to wait for.
        updates: How many updates are waited, at most.
        every: Updates between two measurements.
        lr: Learning rate of SGD.
        momentum: Of SGD.
        batch_size: Images in one step.
        images: Most images to fine-tune on.
    """

    poison_rate: float = 0.1
    until: float = 0.5
    updates: int = 100
    every: int = 5
    lr: float = 0.01
    momentum: float = 0.9
    batch_size: int = 128
    images: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("updates", 1), ("every", 1), ("batch_size", 2), ("images", 2)):
            self.check_at_least(name, least)
        for name in ("lr", "poison_rate", "until"):
            self.check_positive(name)
        for name in ("momentum", "poison_rate", "until"):
            self.check_share(name)

    def lacks(self, case: Case) -> str | None:
        """See `AuditMethod`."""
        return "a trigger to poison images with" if case.trigger is None else None

    def run(self, case: Case, run: Run) -> RelearningFinding:
        """See `AuditMethod`."""
        beside = "before" if case.clean_model is None else "clean_model"
        curve, other = self._curve("after", case, run), self._curve(beside, case, run)
        return RelearningFinding(
            case.rate_name, self.until, self.updates, self._first(curve), curve, beside, self._first(other), other
        )

    def _curve(self, name: str, case: Case, run: Run) -> Curve:
        assert case.trigger is not None
        subset = at_most(case.clean, self.images, derived_seed(run.seed, "relearning images"))
        seed = derived_seed(run.seed, "relearning poisons")
        count = max(1, round(self.poison_rate * len(subset)))
        data = Poisoned(subset.in_batches_of(self.batch_size), case.trigger, count, seed)
        _, curve = trained_copy(
            case.network(name),
            data,
            case,
            run,
            f"relearning {name}",
            lr=self.lr,
            momentum=self.momentum,
            epochs=self.updates,  # as many as there can be of one batch each
            every=self.every,
            until=self.until,
            most=self.updates,
        )
        return curve

    def _first(self, curve: Curve) -> int | None:
        return next((updates for updates, figures in curve if (figures.rate or 0.0) >= self.until), None)
