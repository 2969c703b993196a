"""What fine-tuning on few clean images minimises: it holds on to what the model knows, and to none of its backdoor."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from bdfast.data.augment import overlaid
from bdfast.data.batches import Batch
from bdfast.modes import eval_mode
from bdfast.training import Run, StepResult

TEMPERATURE = 2.0


class GuidedBatch(NamedTuple):
    """A batch as the model in training gets it, and the teacher's logits [B, K] for it as it was before."""

    batch: Batch
    guidance: torch.Tensor | None


@dataclass(frozen=True)
class GuidedLoss:
    """Cross-entropy with the labels, mixed with the distance from a teacher's answers.

    A few thousand labels say less about an image than the model that is being cleaned does, and on clean images its
    answers are clean: Hinton et al., "Distilling the knowledge in a neural network" (2015), with the suspect network as
    the teacher as in Yoshida and Fujino, "Disabling backdoor and identifying poison data by using knowledge
    distillation" (AISec 2020). The teacher never sees an overlay: that could be a trigger (docs/choosing-strength.md).

    Attributes:
        run: Gives the forward pass and the precision.
        teacher: The model as it was handed in; only read.
        distill: Share of the teacher, in [0, 1].
        overlay: See `bdfast.data.augment.overlaid`; for batches that are (images, ...).
        label_smoothing: Share of the label that is spread over all classes.
    """

    run: Run
    teacher: nn.Module
    distill: float
    overlay: float
    label_smoothing: float = 0.0

    def prepare(self, batch: Batch) -> GuidedBatch:
        """Ask the teacher about the batch, then overlay its images."""
        guidance = None
        if self.distill > 0:
            with eval_mode(self.teacher), torch.no_grad(), self._autocast():
                guidance = self.run.forward(self.teacher, batch)[0].float()
        if self.overlay > 0 and isinstance(batch, tuple | list):
            batch = (overlaid(batch[0], self.overlay), *batch[1:])
        return GuidedBatch(batch, guidance)

    def __call__(self, model: nn.Module, guided: GuidedBatch) -> StepResult:
        """The loss of `model`, with its logits and the targets."""
        with self._autocast():
            logits, targets = self.run.forward(model, guided.batch)
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        if guided.guidance is not None:
            distance = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, 1),
                F.log_softmax(guided.guidance / TEMPERATURE, 1),
                reduction="batchmean",
                log_target=True,
            )
            # Gradients of softened answers shrink with the square of the temperature.
            loss = torch.lerp(loss, TEMPERATURE**2 * distance, self.distill)
        return StepResult(loss, logits, targets)

    def _autocast(self) -> AbstractContextManager[Any]:
        return self.run.autocast(next(self.teacher.parameters()).device)
