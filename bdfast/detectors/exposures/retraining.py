"""Updates of all weights of a copy by Adam, at a rate that grows until the network has changed enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batch, Batches
from bdfast.detectors.exposures.standing import Ended
from bdfast.ops.finite import check_finite_gradients
from bdfast.task import StepResult
from bdfast.training import Run
from bdfast.training.copies import copy_of

WEIGHT_DECAY = 5e-4
"""Of Adam, as published."""


@dataclass(frozen=True)
class Schedule:
    """How a copy is trained.

    Attributes:
        updates: Most updates, about: whole epochs.
        lr: Rate of the first epoch.
        growth: Factor on the rate for each update before an epoch. The first rate that moves a network differs by
            orders of magnitude between networks, and a rate that grows gets there for all of them.
        batch_statistics: Training mode, in which BatchNorm normalises with the batch; else eval mode.
    """

    updates: int
    lr: float
    growth: float
    batch_statistics: bool


def retrained(
    model: nn.Module,
    images: Batches,
    run: Run,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    ended: Ended,
    stage: str,
) -> nn.Module:
    """A copy of `model` after some epochs of descent on a loss.

    Args:
        model: Only read.
        images: Clean images, in batches of the size of an update.
        run: Seed, precision, progress and history.
        loss_of: Logits [..., K] in float32 or more, targets [...] -> [].
        schedule: See there.
        ended: Asked after every epoch.
        stage: Its name in history and progress; the order of batches follows from it and the seed.

    Raises:
        FloatingPointError: A gradient is NaN or infinite.
    """
    copy = copy_of(model)
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    optimizer = torch.optim.Adam(copy.parameters(), lr=schedule.lr, weight_decay=WEIGHT_DECAY)
    in_epoch = -(-len(images) // images.batch_size)

    def step(batch: Batch) -> StepResult:
        copy.train(schedule.batch_statistics)  # the loop sets training mode
        optimizer.zero_grad()
        with run.autocast(images.device):
            logits, targets = run.forward(copy, batch)
        loss = loss_of(task.at_least_float32(logits), targets)
        loss.backward()
        check_finite_gradients(copy.named_parameters())
        optimizer.step()
        return task.measured(loss, logits, targets)

    run.epochs(
        stage,
        copy,
        images,
        step,
        optimizer,
        epochs=max(1, round(schedule.updates / in_epoch)),
        lr=lambda epoch: schedule.lr * schedule.growth ** (epoch * in_epoch),
        ended=lambda _: ended(copy),
    )
    return copy
