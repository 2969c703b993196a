"""Plain training of a network: SGD on the one-cycle schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from bdfast import task
from bdfast.data.batches import Batch, Batches
from bdfast.ops.finite import check_finite_gradients
from bdfast.task import StepResult
from bdfast.training.history import Row
from bdfast.training.loop import Run
from bdfast.training.modes import preserved_modes
from bdfast.training.progress import Progress, Silent
from bdfast.training.seeds import seeded


def fit(
    model: nn.Module,
    data: Dataset[Any],
    *,
    epochs: int = 5,
    batch_size: int = 128,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 0,
    amp: bool = True,
    progress: Progress | None = None,
) -> list[Row]:
    """Train `model` in place, with SGD (Nesterov momentum 0.9) on the one-cycle schedule.

    Smith and Topin, "Super-convergence" (2018): a few epochs do what a hundred of a flat schedule do.

    Args:
        model: A classifier with fresh weights.
        data: Training set, poisoned or not.
        epochs: Passes over it.
        batch_size: Images in one step.
        lr: Peak of the schedule.
        weight_decay: L2 penalty.
        seed: Of the order of batches.
        amp: bfloat16 where the device computes in it.
        progress: Where to show progress.

    Returns:
        One `Epoch` per epoch.
    """
    device = task.device_of(model)
    batches = Batches(data, device=device, batch_size=batch_size, name="data")
    run = Run(seed=seed, amp=amp, progress=progress or Silent())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    steps = epochs * -(-len(batches) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)

    def step(batch: Batch) -> StepResult:
        optimizer.zero_grad()
        with run.autocast(device):
            logits, targets = run.forward(model, batch)
        loss = task.cross_entropy(logits, targets)
        loss.backward()
        check_finite_gradients(model.named_parameters())
        optimizer.step()
        schedule.step()
        return task.measured(loss, logits, targets)

    with preserved_modes(model), seeded(seed, device):
        run.epochs("train", model, batches, step, optimizer, epochs=epochs)
    return run.history
