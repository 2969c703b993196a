"""What a batch means: a forward pass that gives logits and targets, and from these a loss and the number of hits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Forward = Callable[[nn.Module, Any], tuple[Tensor, ...]]
"""(model, batch) -> (logits [..., K], targets [...]): [B, K] for images, [B, T, K] for tokens, [B, B] for pairs."""

IGNORED = -100
"""A target that counts neither in the loss nor in the accuracy, such as padding; the value that torch uses."""


class StepResult(NamedTuple):
    """What a step reports: the mean loss [], the number of right predictions [] and of all predictions []."""

    loss: Tensor
    hits: Tensor
    total: Tensor


def default_forward(model: nn.Module, batch: Any) -> tuple[Tensor, ...]:
    """For batches of (images, labels) and of (images, target labels, original labels)."""
    images, *labels = batch
    return (model(images), *labels)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32; float64, in which tests compare, stays what it is."""
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy [] of logits [..., K] and targets [...], in float32 or more.

    `IGNORED` targets do not count.
    """
    flat = at_least_float32(logits).flatten(0, -2)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing)


def hits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits [..., K] and targets [...], the number of right predictions [] and of all predictions [], int64."""
    return (logits.argmax(-1) == targets).sum(), (targets != IGNORED).sum()


def measured(loss: Tensor, logits: Tensor, targets: Tensor) -> StepResult:
    """The loss with the hits of logits [..., K] on targets [...]."""
    return StepResult(loss, *hits(logits.detach(), targets))


def device_of(model: nn.Module) -> torch.device:
    """The one device of a model's parameters.

    Raises:
        ValueError: There are none, or they lie on several.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no parameters at all"
        raise ValueError(f"model: expected parameters on one device, got {found}; move the model with .to(device).")
    return devices.pop()


def checked_forward(
    model: nn.Module, batch: Any, forward: Forward, where: str, *, labels: int = 1
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits and label columns of a batch.

    Args:
        model: Any classifier.
        batch: What the data gave.
        forward: See `Forward`.
        where: What the messages call the batch.
        labels: How many label columns are expected: 1 for clean data, 2 for triggered data.

    Raises:
        ValueError: The model does not take the batch, the logits are NaN, or the labels do not fit.
    """
    try:
        logits, *columns = forward(model, batch)
    except (RuntimeError, ValueError, TypeError) as error:
        shapes = (
            [list(part.shape) for part in batch if isinstance(part, Tensor)]
            if isinstance(batch, tuple | list)
            else type(batch).__name__
        )
        raise ValueError(
            f"{where}: expected input that the model takes, got {shapes}, and the model said: {error}; "
            "check image size and channels, or pass forward=."
        ) from error
    if logits.ndim < 2:
        raise ValueError(
            f"{where}: expected logits [B, K] from the model, got {list(logits.shape)}; pass forward= that "
            "returns them."
        )
    if bool(logits.isnan().any()):
        raise ValueError(f"{where}: expected finite logits, got NaN; look for NaN in the weights or the images.")
    if len(columns) != labels:
        raise ValueError(
            f"{where}: expected {labels} label(s) per sample, got {len(columns)}; a clean set gives (image, label), a "
            "triggered one (image, target label, original label), or pass forward= that returns (logits, targets)."
        )
    for column in columns:
        _check_labels(column, logits, where)
    return logits, tuple(columns)


def _check_labels(column: Tensor, logits: Tensor, where: str) -> None:
    if column.shape != logits.shape[:-1]:
        raise ValueError(
            f"{where}: expected labels {list(logits.shape[:-1])} for logits {list(logits.shape)}, got "
            f"{list(column.shape)}; give one class number per prediction."
        )
    counted = column[column != IGNORED]
    if not len(counted):
        return
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= logits.shape[-1]:
        raise ValueError(
            f"{where}: expected labels 0..{logits.shape[-1] - 1}, since the model has {logits.shape[-1]} outputs, "
            f"got {low}..{high}; relabel the data or load the right model."
        )
