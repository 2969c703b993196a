"""Training from scratch with SGD, as ABL and CBD do it: their shared options, and the loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batch, Batches
from bdfast.ops.finite import check_finite_gradients
from bdfast.suppression.base import Suppression
from bdfast.task import StepResult
from bdfast.training import Epoch, Run
from bdfast.training.batchnorm import batchnorms

Schedule = Literal["cosine", "step", "constant"]
Objective = Callable[[Tensor, Tensor, Batch], Tensor]
"""Logits [..., K] in float32 or more, targets [...] and their batch -> the loss [] that is minimised."""


@dataclass(frozen=True)
class SGDTraining(Suppression):
    """Training with SGD and Nesterov momentum.

    Attributes:
        lr: Learning rate in the first epoch. 0.1 is too much for a network without BatchNorm.
        schedule: How it falls from epoch to epoch: "cosine", to zero; "step", to a tenth at the published shares of the
            epochs; or "constant".
        momentum: Of SGD.
        weight_decay: L2 penalty.
    """

    lr: float = 0.1
    schedule: Schedule = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4

    drops: ClassVar[tuple[float, ...]] = ()
    """The shares of the epochs after which "step" takes a tenth of the rate."""

    def __post_init__(self) -> None:
        self.check_positive("lr")
        self.check_share("momentum")
        self.check_at_least("weight_decay", 0)
        self.check_one_of("schedule", "cosine", "step", "constant")
        super().__post_init__()

    def train(
        self,
        stage: str,
        model: nn.Module,
        data: Batches,
        run: Run,
        objective: Objective,
        *,
        epochs: int,
        lr: float | None = None,
        schedule: Schedule | None = None,
        ascend: bool = False,
        frozen: bool = False,
        ended: Callable[[Epoch], bool] | None = None,
    ) -> None:
        """Train `model` in place; the history shows the plain cross-entropy, whatever the objective.

        Args:
            stage: Its name in history, progress and checkpoints.
            model: What is trained.
            data: What it is trained on.
            run: Seed, precision, progress, history and checkpoints.
            objective: What is minimised.
            epochs: Passes over the data.
            lr: Learning rate, if not that of the options.
            schedule: How it falls, if not as in the options.
            ascend: Maximise the objective instead.
            frozen: BatchNorm normalises with its running statistics, and leaves them as they are.
            ended: Asked after every epoch; True ends the stage.
        """
        rate, schedule = lr or self.lr, schedule or self.schedule
        optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=rate,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
            maximize=ascend,
        )

        def step(batch: Batch) -> StepResult:
            if frozen:
                for layer in batchnorms(model):
                    layer.eval()
            optimizer.zero_grad()
            with run.autocast(data.device):
                logits, targets = run.forward(model, batch)[:2]
            logits = task.at_least_float32(logits)
            objective(logits, targets, batch).backward()
            check_finite_gradients(model.named_parameters())
            optimizer.step()
            return task.measured(task.cross_entropy(logits.detach(), targets), logits, targets)

        run.epochs(
            stage,
            model,
            data,
            step,
            optimizer,
            epochs=epochs,
            lr=lambda epoch: rate * self._decay(schedule, epoch / epochs),
            ended=ended,
        )

    def _decay(self, schedule: Schedule, done: float) -> float:
        if schedule == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        # Rounded, as 14 epochs of 20 are less than 0.7 of them in floating-point numbers.
        return 0.1 ** sum(round(done, 9) >= share for share in self.drops) if schedule == "step" else 1.0


def plain_loss(logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy."""
    return task.cross_entropy(logits, targets)


def enough_epochs(published: int, least_updates: int, samples: int, batch_size: int) -> int:
    """The published number, or more where the data is so little that these make fewer than `least_updates` updates.

    What trains a network is the number of updates: 20 epochs of CIFAR-10 are 7,800, of 1,000 images 160.
    """
    return max(published, -(-least_updates // -(-samples // batch_size)))
