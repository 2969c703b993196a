"""Fine-tuning loss: cross-entropy mixed with distillation from the given model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from bdfast.data.augmentation import overlaid
from bdfast.data.batches import Batch, with_images
from bdfast.defenses.loss import FineTuningLoss, PreparedBatch
from bdfast.defenses.stages import Staged
from bdfast.training import Run
from bdfast.training.modes import eval_mode

TEMPERATURE = 2.0

Loss = TypeVar("Loss", bound="DistillationLoss")


@dataclass(frozen=True)
class DistillationLoss(FineTuningLoss):
    """Cross-entropy with the labels, mixed with the distance from a teacher's answers.

    A few thousand labels say less about an image than the given model does, and on clean images its answers are clean:
    Hinton et al., "Distilling the knowledge in a neural network" (2015), with the suspect network as the teacher as in
    Yoshida and Fujino, "Disabling backdoor and identifying poison data by using knowledge distillation" (AISec 2020).
    The teacher never sees an overlay: that could be a trigger (docs/choosing-strength.md).

    Attributes:
        teacher: The original model; only read.
        distill: Share of the teacher, in [0, 1].
        overlay: See `bdfast.data.augmentation.overlaid`; for batches that are (images, ...).
    """

    teacher: nn.Module = field(kw_only=True)
    distill: float = field(kw_only=True)
    overlay: float = field(kw_only=True)

    def prepare(self, batch: Batch) -> PreparedBatch:
        """Ask the teacher about the batch, then overlay its images."""
        answers = None
        if self.distill > 0:
            with eval_mode(self.teacher), torch.no_grad():
                answers = self.outputs(self.teacher, batch)[0]
        if self.overlay > 0 and isinstance(batch, tuple | list):
            batch = with_images(batch, overlaid(batch[0], self.overlay))
        return PreparedBatch(batch, answers)

    def of(self, logits: torch.Tensor, targets: torch.Tensor, prepared: PreparedBatch) -> torch.Tensor:
        """The mean loss [] of logits [..., K] and targets [...]; the teacher's answers lie in `prepared.kept`."""
        loss = super().of(logits, targets, prepared)
        if prepared.kept is None:
            return loss
        distance = F.kl_div(
            F.log_softmax(logits.flatten(0, -2) / TEMPERATURE, 1),
            F.log_softmax(prepared.kept.flatten(0, -2) / TEMPERATURE, 1),
            reduction="batchmean",
            log_target=True,
        )
        # Gradients of softened answers shrink with the square of the temperature.
        return torch.lerp(loss, TEMPERATURE**2 * distance, self.distill)


@dataclass(frozen=True)
class Distilling(Staged):
    """Fine-tuning with the original model as a teacher, and with other clean images laid over each.

    Attributes:
        distill: Share of the loss that asks for the answers of the original model; published: 0.
        overlay: Greatest weight of another clean image laid over each; published: 0.
    """

    distill: float = 0.9
    overlay: float = 0.15

    def __post_init__(self) -> None:
        self.check_share("distill")
        self.check_share("overlay", most=0.49)
        super().__post_init__()

    def loss(self, given: nn.Module, run: Run) -> FineTuningLoss:
        """Cross-entropy mixed with distillation from `given`."""
        return self.distillation(DistillationLoss, given, run)

    def distillation(self, kind: type[Loss], given: nn.Module, run: Run, **more: Any) -> Loss:
        """A loss of this kind with these options; `more` is what the kind has beside them."""
        options = {"teacher": given, "distill": self.distill, "overlay": self.overlay, **more}
        return kind(run, self.label_smoothing, **options)
