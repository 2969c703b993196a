"""The loss of a fine-tuning, in two steps, so that a method may look at a batch before it is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from bdfast import task
from bdfast.data.batches import Batch
from bdfast.task import StepResult
from bdfast.training import Run


class PreparedBatch(NamedTuple):
    """A batch as the model in training gets it, and what the loss keeps of it as it was before."""

    batch: Batch
    kept: torch.Tensor | None = None
    beside: Any = None
    """What else a method keeps."""


@dataclass(frozen=True)
class FineTuningLoss:
    """Cross-entropy with the labels.

    Attributes:
        run: Gives the forward pass and the precision.
        label_smoothing: Share of the label that is spread over other classes.
        spread: Which these are: "all" K with a K-th of the share each, as in torch, or the K - 1 "wrong" ones.
    """

    run: Run
    label_smoothing: float = 0.0
    spread: Literal["all", "wrong"] = "all"

    def prepare(self, batch: Batch) -> PreparedBatch:
        """Called once for a batch, before any pass of the step and before its images are triggered."""
        return PreparedBatch(batch)

    def __call__(self, model: nn.Module, prepared: PreparedBatch) -> StepResult:
        """The loss of `model` on a batch; a step with several passes calls this for each of them."""
        logits, targets = self.outputs(model, prepared.batch)
        return task.measured(self.of(logits, targets, prepared), logits, targets)

    def of(self, logits: torch.Tensor, targets: torch.Tensor, prepared: PreparedBatch) -> torch.Tensor:
        """The mean loss [] of logits [..., K] and targets [...]."""
        if self.spread == "all" or not self.label_smoothing:
            return task.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        # eps / (K - 1) for each wrong class is a K-th of this for every class, which with K = 2 may exceed what torch
        # takes.
        classes = logits.shape[-1]
        share = self.label_smoothing * classes / (classes - 1)
        uniform = task.cross_entropy(logits, targets, label_smoothing=1.0)
        return torch.lerp(task.cross_entropy(logits, targets), uniform, share)

    def outputs(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [..., K] in float32 or more, and targets [...]."""
        device = next(model.parameters()).device
        with self.run.autocast(device):
            logits, targets = self.run.forward(model, batch)
        return task.at_least_float32(logits), targets
