"""Retuning: fine-tuning on clean images with a handful of poisoned ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from bdfast.audits.base import AuditMethod, Finding
from bdfast.audits.case import Case
from bdfast.audits.poisoned_training import Curve, trained_copy
from bdfast.audits.rates import Figures, rises, share
from bdfast.audits.triggers import Poisoned
from bdfast.data.batches import Batches
from bdfast.training import Run
from bdfast.training.seeds import derived_seed


@dataclass(frozen=True)
class RetuningFinding(Finding):
    """What the purified network shows after retuning.

    Attributes:
        images: How many it was retuned on.
        poisons: How many of them were poisoned.
        updates: Steps of the optimizer.
        curve: After each epoch, the start first.
        control: The same of the clean network; None without one.
    """

    images: int
    poisons: int
    updates: int
    curve: Curve
    control: Curve | None

    @property
    def p_rate(self) -> float | None:
        """The rate after retuning."""
        return self.curve[-1][1].rate

    @property
    def by_itself(self) -> float:
        """What the clean network learns by the same."""
        return 0.0 if self.control is None else self.control[-1][1].rate or 0.0

    def sentences(self, after: Figures) -> list[str]:
        """See `Finding`."""
        old, new = self.curve[0][1], self.curve[-1][1]
        said = [
            f"Retuning on {self.images:,} images, {self.poisons} of them poisoned, in {self.updates} updates brings "
            f"the {self.rate_name} from {share(old.rate)} to {share(new.rate)}, at an ACC of {share(new.acc)}."
        ]
        if self.control is not None:
            said.append(f"A clean network gets to {share(self.by_itself)} by the same.")
        elif rises(new.rate, old.rate):
            said.append("How much of this a clean network would learn as well is not known; give clean_model.")
        return said


@dataclass(frozen=True)
class RetuningAudit(AuditMethod):
    """The retuning attack of Min et al., "Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor
    Defense" (NeurIPS 2024, arXiv 2410.09838), with the settings of its script.

    All parameters are fine-tuned with SGD in training mode on a few clean images, of which `poisons` are given the
    trigger and its label. A network whose backdoor was only hidden has its ASR back after it. The script takes 2 % of
    CIFAR-10's training set, 1,000 images, and augments each once; here they are the defender's, as they are. Settings
    of the paper for other data sets are not known.

    Attributes:
        images: Most images to fine-tune on.
        poisons: How many of them are poisoned.
        lr: Learning rate.
        momentum: Of SGD; there is no weight decay.
        epochs: Passes over the images.
        batch_size: Images in one step.
    """

    paper: ClassVar[str] = "Min et al., NeurIPS 2024, arXiv 2410.09838"

    images: int = 1000
    poisons: int = 5
    lr: float = 0.01
    momentum: float = 0.9
    epochs: int = 5
    batch_size: int = 128

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("poisons", 1), ("epochs", 1), ("batch_size", 2)):
            self.check_at_least(name, least)
        self.check_positive("lr")
        self.check_share("momentum")

    def lacks(self, case: Case) -> str | None:
        """See `AuditMethod`."""
        return "a trigger to poison images with" if case.trigger is None else None

    def run(self, case: Case, run: Run) -> RetuningFinding:
        """See `AuditMethod`."""
        data = self.poisoned(case, run)
        _, curve = self.retuned(case, run)
        control = None if case.clean_model is None else self.retuned(case, run, "clean_model")[1]
        return RetuningFinding(case.rate_name, len(data), len(data.chosen), curve[-1][0], curve, control)

    def poisoned(self, case: Case, run: Run) -> Poisoned:
        """The images to fine-tune on."""
        assert case.trigger is not None
        subset = at_most(case.clean, self.images, derived_seed(run.seed, "retuning images"))
        seed = derived_seed(run.seed, "retuning poisons")
        return Poisoned(subset.in_batches_of(self.batch_size), case.trigger, self.poisons, seed)

    def retuned(self, case: Case, run: Run, name: str = "after") -> tuple[nn.Module, Curve]:
        """A retuned copy of a network of the case, made once for all audits, and its way."""
        key = (self, name)
        if key not in case.kept:
            # Other options under the same name, as those inside of another audit, have checkpoints of their own.
            others = sum(known[1] == name for known in case.kept)
            case.kept[key] = trained_copy(
                case.network(name),
                self.poisoned(case, run),
                case,
                run,
                f"retuning {name}" + (f" {others + 1}" if others else ""),
                lr=self.lr,
                momentum=self.momentum,
                epochs=self.epochs,
            )
        found: tuple[nn.Module, Curve] = case.kept[key]
        return found


def at_most(clean: Batches, count: int, seed: int) -> Batches:
    """`count` of the images, drawn by the seed; all, if there are no more."""
    return clean if len(clean) <= count else clean.split(count / len(clean), seed)[0]
