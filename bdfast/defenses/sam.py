"""Fine-tuning with plain SAM, the baseline of FT-SAM and PAM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import SGD

from bdfast.data.batches import Batches
from bdfast.defenses.base import Outcome
from bdfast.defenses.fine_tuning import FineTuning
from bdfast.optim import SAM
from bdfast.training import Run
from bdfast.training.copies import copy_of


@dataclass(frozen=True)
class SAMDefense(FineTuning):
    """Fine-tuning with SAM as Foret et al. (ICLR 2021) give it.

    Attributes:
        rho: Radius of the perturbation, in the units of the weights.
    """

    paper: ClassVar[str] = "Foret et al., ICLR 2021, arXiv 2010.01412"

    rho: float = 0.05

    def __post_init__(self) -> None:
        self.check_at_least("rho", 0)
        super().__post_init__()

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Outcome:
        """Purify `model` in place; see `Defense.run`."""
        self.fine_tune(model, copy_of(model), clean, run, "fine-tune")
        return Outcome()

    def optimizer(self, model: nn.Module, given: nn.Module) -> SAM:
        """SGD with the gradient of the perturbed weights."""
        return SAM(
            model.named_parameters(),
            SGD,
            rho=self.rho,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
