"""Fine-tuning with plain SAM, the baseline of FT-SAM and PAM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import SGD

from bdfast.data.batches import Batches
from bdfast.defenses.stages import Begun, Staged
from bdfast.inversion.surrogates import Surrogates
from bdfast.optim import SAM
from bdfast.training import Run


@dataclass(frozen=True)
class SAMDefense(Staged):
    """Fine-tuning with SAM as Foret et al. (ICLR 2021) give it.

    Attributes:
        rho: Radius of the perturbation, in the units of the weights.
    """

    paper: ClassVar[str] = "Foret et al., ICLR 2021, arXiv 2010.01412"

    rho: float = 0.05

    def __post_init__(self) -> None:
        self.check_at_least("rho", 0)
        super().__post_init__()

    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """See `Staged.begin`."""
        return Begun(lambda options, images, stage: options.fine_tune(model, given, images, run, stage))

    def optimizer(self, model: nn.Module, given: nn.Module) -> SAM:
        """SGD with the gradient of the perturbed weights."""
        return SAM(
            model.named_parameters(),
            SGD,
            rho=self.rho,
            lr=self.rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
