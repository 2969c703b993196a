"""SFFT, shuffle fine-tuning: descent on clean images with labels that are drawn anew in every batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batches
from bdfast.detectors.exposures.retraining import Schedule, retrained
from bdfast.detectors.exposures.standing import Ended
from bdfast.training import Run

LR = 1e-4
"""As published."""


def shuffled_labels(
    model: nn.Module, images: Batches, run: Run, schedule: Schedule, ended: Ended, stage: str
) -> nn.Module:
    """A copy that was fine-tuned on random labels. See `retrained`."""
    return retrained(model, images, run, random_label_loss, schedule, ended, stage)


def random_label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy [] of logits [..., K] with labels uniform over the classes, from torch's generator.

    Targets [...] only say which samples do not count.
    """
    drawn = torch.randint(logits.shape[-1], targets.shape, device=targets.device)
    return task.cross_entropy(logits, torch.where(targets == task.IGNORED, targets, drawn))
