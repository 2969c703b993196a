"""FST: fine-tuning with a new classifier that is pushed away from the given one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bdfast.data.augmentation import Augmentation
from bdfast.defenses.loss import PreparedBatch
from bdfast.defenses.parts.sphere import AwayLoss, OnSphere
from bdfast.task import StepResult
from bdfast.training import Run


@dataclass(frozen=True)
class FSTDefense(OnSphere):
    """Min et al., "Towards stable backdoor purification through feature shift tuning" (NeurIPS 2023, arXiv 2310.01875).

    The classifier starts anew, and the loss has the inner product of its weight with the given one beside the
    cross-entropy. So the features cannot serve the old classifier, and with it the backdoor, any more. After every
    update the weight is scaled to the norm that it had.

    Attributes:
        alpha: Weight of the inner product. The published code has 0.2 as its default, its README takes 0.1 for
            CIFAR-10, and less for more classes.
        updates: Updates of a stage, about; published: 80, which are 10 epochs of 1,000 images in batches of 128.
    """

    paper: ClassVar[str] = "Min et al., NeurIPS 2023, arXiv 2310.01875"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "alpha": 0.1,
        "lr": 0.01,
        "epochs": 10,
        "weight_decay": 0.0,
        "distill": 0.0,
        "overlay": 0.0,
        "batch_size": 128,
        "amp": False,
        "augment": Augmentation(shift=4, flip=True),
    }
    """The published run on CIFAR-10, with 2 % of its images, as arguments of `purify`. It has no flip on other data
    sets."""

    alpha: float = 0.2

    def __post_init__(self) -> None:
        self.check_at_least("alpha", 0)
        super().__post_init__()

    def restart(self, layer: nn.Linear, radius: Tensor, draws: torch.Generator) -> None:
        """Draw weight and bias as a new `nn.Linear` does; the norm is that of the given one after the first update."""
        bound = layer.in_features**-0.5
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    drawn = torch.rand(parameter.shape, generator=draws, dtype=torch.float64)
                    parameter.copy_(bound * (2 * drawn - 1))

    def away(self, given: nn.Module, run: Run, classifier: str) -> AwayLoss:
        """Cross-entropy, and the inner product with the given weight."""
        return self.distillation(InnerProductLoss, given, run, classifier=classifier, alpha=self.alpha)


@dataclass(frozen=True)
class InnerProductLoss(AwayLoss):
    """The loss on the images, and alpha times the inner product of the classifier's weight with the given one.

    Attributes:
        alpha: See `FSTDefense`.
    """

    alpha: float = field(kw_only=True)

    def __call__(self, model: nn.Module, prepared: PreparedBatch) -> StepResult:
        """The loss of `model` on a batch."""
        result = super().__call__(model, prepared)
        weight, origin = self.weights(model)
        return result._replace(loss=result.loss + self.alpha * (weight * origin).sum())
