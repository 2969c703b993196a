"""D3: as far from the given classifier as a small loss on the clean images allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdfast.data.augmentation import Augmentation
from bdfast.defenses.loss import FineTuningLoss, PreparedBatch
from bdfast.defenses.parts.sphere import AwayLoss, OnSphere, random_point
from bdfast.task import IGNORED, StepResult
from bdfast.training import Run


@dataclass(frozen=True)
class D3Defense(OnSphere):
    """Wei et al., "Backdoor mitigation by distance-driven detoxification" (ICCV 2025, arXiv 2411.09585).

    The weight of the classifier starts at a random point on the sphere around zero that the given one lies on. The
    loss lowers the cross-entropy of clean images that is above a threshold, and raises the distance from the given
    weight. After every update the weight is scaled back to the sphere. The bias goes on from the given one.

    On the sphere the square of the distance is a constant less twice the inner product that FST lowers.

    Attributes:
        clean_weight: Weight of the loss on the images (lambda), beside the distance. Above 1 the published code divides
            both by lambda + 1, which is the same as a lower `lr`.
        eps: Cross-entropy of an image below which it does not count.
        updates: Updates of a stage, about; published: 1,000, which are 100 epochs of 2,500 images in batches of 256.
    """

    paper: ClassVar[str] = "Wei et al., ICCV 2025, arXiv 2411.09585"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "clean_weight": 0.5,
        "eps": 0.1,
        "lr": 0.01,
        "epochs": 100,
        "weight_decay": 0.0,
        "distill": 0.0,
        "overlay": 0.0,
        "batch_size": 256,
        "amp": False,
        "augment": Augmentation(shift=4, flip=True),
    }
    """The published run on CIFAR-10, with 5 % of its images, as arguments of `purify`. Its settings have a weight decay
    that its optimizer does not get, and other norms, starts and layers than its defaults, which we leave out."""

    clean_weight: float = 0.5
    eps: float = 0.1

    def __post_init__(self) -> None:
        self.check_positive("clean_weight")
        self.check_at_least("eps", 0)
        super().__post_init__()

    def restart(self, layer: nn.Linear, radius: Tensor, draws: torch.Generator) -> None:
        """Put the weight at a random point of its sphere."""
        with torch.no_grad():
            layer.weight.copy_(random_point(layer.weight, radius, draws))

    def away(self, given: nn.Module, run: Run, classifier: str) -> AwayLoss:
        """Cross-entropy above the threshold, and the distance from the given weight."""
        options = {"classifier": classifier, "clean_weight": self.clean_weight, "eps": self.eps}
        return self.distillation(DistanceLoss, given, run, **options)


@dataclass(frozen=True)
class HingeLoss(FineTuningLoss):
    """Cross-entropy above a threshold.

    Attributes:
        eps: See `D3Defense`.
    """

    eps: float = field(kw_only=True)

    def of(self, logits: Tensor, targets: Tensor, prepared: PreparedBatch) -> Tensor:
        """The mean [] over images of what is above the threshold, of logits [..., K] and targets [...]."""
        options: dict[str, Any] = {"reduction": "none", "label_smoothing": self.label_smoothing}
        errors = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, **options)
        return F.relu(errors - self.eps).sum() / (targets != IGNORED).sum()


@dataclass(frozen=True)
class DistanceLoss(AwayLoss, HingeLoss):
    """`clean_weight` times the loss on the images, less the distance of the classifier's weight from the given one.

    Attributes:
        clean_weight: See `D3Defense`.
    """

    clean_weight: float = field(kw_only=True)

    def __call__(self, model: nn.Module, prepared: PreparedBatch) -> StepResult:
        """The loss of `model` on a batch; the gradient of the distance is zero where it is zero."""
        result = super().__call__(model, prepared)
        weight, origin = self.weights(model)
        distance = torch.linalg.vector_norm(weight - origin)
        return result._replace(loss=self.clean_weight * result.loss - distance)
