"""Unlearning: gradient ascent on the clean images in a copy of a network, which shows what holds its knowledge."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from bdfast import task
from bdfast.data.batches import Batch, Batches
from bdfast.ops.finite import check_finite_gradients
from bdfast.selection import LOWER, RETRIES
from bdfast.task import StepResult
from bdfast.training import Epoch, Run
from bdfast.training.copies import copy_of
from bdfast.training.modes import eval_mode

STAGE = "unlearn"

Result = TypeVar("Result")


def unlearned(
    model: nn.Module,
    data: Batches,
    run: Run,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    *,
    to: float,
    epochs: int,
) -> nn.Module:
    """A copy of `model` that has forgotten the clean images, as far as `to` says.

    Args:
        model: Only read.
        data: Clean images.
        run: Seed, precision, progress, history and checkpoints.
        optimizer: Made of the parameters of the copy; has to ascend (`maximize=True`).
        to: What is left of the accuracy beyond that of a constant answer, as a share. The ascent ends within the epoch
            that gets there.
        epochs: Most epochs.

    Raises:
        ValueError: The model is no better than a constant answer.
        RuntimeError: The epochs are not enough.
        FloatingPointError: The ascent became NaN or infinite, at lower rates too.
    """
    start, constant_answer = _accuracies(model, data, run)
    if start <= constant_answer:
        raise ValueError(
            f"{data.name}: expected images on which the model is better than a constant answer, since they are to be "
            f"unlearned, got an accuracy of {start:.1%} where the best constant answer has {constant_answer:.1%}; "
            "check labels, normalisation and checkpoint, or pass images of more classes."
        )
    target = constant_answer + to * max(0.0, start - constant_answer)

    def attempt(lower: float) -> tuple[nn.Module, float]:
        copy, step, ascent = _prepared(model, data, run, optimizer)
        for group in ascent.param_groups:
            group["lr"] *= lower
        stage = STAGE if lower == 1 else f"{STAGE} at {ascent.param_groups[0]['lr']:g}"
        reached = run.epochs(stage, copy, data, step, ascent, epochs=epochs, stop=lambda accuracy: accuracy <= target)
        return copy, reached

    copy, reached = lowered(attempt)
    if not reached <= target:
        raise RuntimeError(
            f"unlearn_epochs: expected the clean accuracy to fall to {target:.1%}, got {reached:.1%} after {epochs} "
            "epochs; raise unlearn_lr, unlearn_to or unlearn_epochs."
        )
    return copy


def lowered(attempt: Callable[[float], Result]) -> Result:
    """The first attempt that stays finite: at the rate as it is, then at lower ones. It is called with the factor."""
    for power in range(RETRIES):
        try:
            return attempt(LOWER**power)
        except FloatingPointError:
            continue
    return attempt(LOWER**RETRIES)


def unlearned_as_published(
    model: nn.Module,
    data: Batches,
    run: Run,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    *,
    ended: Callable[[nn.Module, Epoch], bool],
    epochs: int,
    lr: Callable[[int], float] | None = None,
) -> nn.Module:
    """The same with the rules of published code, which look at whole epochs and go on where these are not enough.

    Args:
        model: See `unlearned`.
        data: See there.
        run: See there.
        optimizer: See there.
        ended: Asked after every epoch, with the copy as it then is and what the epoch showed.
        epochs: Most epochs.
        lr: Learning rate of each epoch, counted from 0; that of the optimizer when left out.
    """
    copy, step, ascent = _prepared(model, data, run, optimizer)
    run.epochs(STAGE, copy, data, step, ascent, epochs=epochs, lr=lr, ended=lambda row: ended(copy, row))
    return copy


def _prepared(
    model: nn.Module,
    data: Batches,
    run: Run,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> tuple[nn.Module, Callable[[Batch], StepResult], torch.optim.Optimizer]:
    copy = copy_of(model)
    ascent = optimizer(copy.parameters())

    def step(batch: Batch) -> StepResult:
        ascent.zero_grad()
        with run.autocast(data.device):
            logits, targets = run.forward(copy, batch)
        loss = task.cross_entropy(logits, targets)
        loss.backward()
        check_finite_gradients(copy.named_parameters())
        ascent.step()
        return task.measured(loss, logits, targets)

    return copy, step, ascent


def _accuracies(model: nn.Module, clean: Batches, run: Run) -> tuple[float, float]:
    """Of the model, and of the best constant answer: chance, or the share of the most frequent label."""
    hits, count, classes = 0, 0, 0
    labels: list[torch.Tensor] = []
    with eval_mode(model), torch.inference_mode(), run.autocast(clean.device):
        for batch in clean.ordered():
            logits, targets = run.forward(model, batch)
            right, counted = task.hits(logits, targets)
            hits, count, classes = hits + int(right), count + int(counted), logits.shape[-1]
            labels.append(targets[targets != task.IGNORED])
    most_frequent = float(torch.bincount(torch.cat(labels)).max()) / count
    return hits / count, max(1 / classes, most_frequent)
