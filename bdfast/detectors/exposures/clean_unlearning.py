"""CUL, clean unlearning: ascent of the loss on clean images."""

from __future__ import annotations

from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batches
from bdfast.detectors.exposures.retraining import Schedule, retrained
from bdfast.detectors.exposures.standing import Ended
from bdfast.training import Run

LR = 1e-5
"""As published."""


def unlearned_clean(
    model: nn.Module, images: Batches, run: Run, schedule: Schedule, ended: Ended, stage: str
) -> nn.Module:
    """A copy that has unlearned clean images: max CE(f(x), y) over all weights. See `retrained`."""
    return retrained(model, images, run, ascent_loss, schedule, ended, stage)


def ascent_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Minus the mean cross-entropy [] of logits [..., K] and targets [...]."""
    return -task.cross_entropy(logits, targets)
