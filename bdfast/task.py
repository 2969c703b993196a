"""What a batch means: a forward pass that gives logits and targets, and from these a loss and the number of hits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

Forward = Callable[[nn.Module, Any], tuple[Tensor, ...]]
"""(model, batch) -> (logits [..., K], targets [...]): [B, K] for images, [B, T, K] for tokens, [B, B] for pairs."""

LOGITS = ("logits", "out", "output", "scores", "pred", "preds", "prediction")
"""Names under which models return their logits, in the order in which they are looked for."""

IGNORED = -100
"""A target that counts neither in the loss nor in the accuracy, such as padding; the value that torch uses."""


class StepResult(NamedTuple):
    """What a step reports: the mean loss [], the number of right predictions [] and of all predictions []."""

    loss: Tensor
    hits: Tensor
    total: Tensor


def default_forward(model: nn.Module, batch: Any) -> tuple[Tensor, ...]:
    """For batches of (images, labels) and of (images, target labels, original labels).

    Images that are floating-point numbers are brought to the dtype of the model.
    """
    images, *labels = batch
    if isinstance(images, Tensor) and images.is_floating_point():
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
        images = images.to(dtype)
    return (model(images), *labels)


def normalized(forward: Forward) -> Forward:
    """The same forward pass, with the logits taken out of what the model returns, and labels as int64.

    Logits are found in a dict, a named tuple or an object under a name of `LOGITS`. Labels may have any integer type,
    or be whole numbers in a floating-point type, with a superfluous last dimension of one.

    Raises:
        ValueError: On call, where logits or labels are not found.
    """

    def run(model: nn.Module, batch: Any) -> tuple[Tensor, ...]:
        output, *labels = forward(model, batch)
        logits = logits_of(output)
        return (logits, *(class_numbers(column, logits) for column in labels))

    return run


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned.

    Raises:
        ValueError: There are none under a common name.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and len(output) == 1:
        return logits_of(output[0])
    for name in LOGITS:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise ValueError(
        f"model: expected logits, a tensor, or a dict or object with one of {', '.join(LOGITS)}, got "
        f"{type(output).__name__}; pass forward=lambda model, batch: (logits, targets) that takes them out."
    )


def class_numbers(labels: Any, logits: Tensor) -> Tensor:
    """Labels as int64, of the shape [...] of logits [..., K].

    Raises:
        ValueError: They are no whole numbers, or soft or one-hot labels.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"labels: expected class numbers in a tensor, got {type(labels).__name__}; give every sample an integer "
            "label."
        )
    if labels.ndim == logits.ndim and labels.shape[:-1] == logits.shape[:-1]:
        if labels.shape[-1] == 1:
            labels = labels.squeeze(-1)
        elif labels.shape == logits.shape:
            raise ValueError(
                f"labels: expected one class number per sample, got {list(labels.shape)}, which are one-hot or soft "
                "labels; pass labels.argmax(-1)."
            )
    if labels.dtype == torch.int64:
        return labels
    if labels.is_complex() or (labels.is_floating_point() and not bool((labels == labels.round()).all())):
        raise ValueError(
            f"labels: expected whole numbers, got {labels.dtype} with fractions or NaN; give every sample a class "
            "number."
        )
    return labels.long()


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
        ValueError: There are none, they lie on several devices, or they have no values yet.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"model: expected initialised parameters, got {name}, which is lazy; run one forward pass first, so "
                "that its layer takes its size."
            )
        if parameter.is_meta:
            raise ValueError(
                f"model: expected parameters with values, got {name} on the meta device; load the weights first, for "
                "example with load_state_dict(..., assign=True)."
            )
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
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        if str(error).startswith(("labels: ", "model: ")):
            raise ValueError(f"{where}: {error}") from error
        raise ValueError(
            f"{where}: expected input that the model takes, got {_described(batch)}, and the model said: {error}; "
            "check image size, channels and dtype, or pass forward=."
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


def _described(batch: Any) -> str:
    if isinstance(batch, tuple | list):
        return ", ".join(f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in batch)
    return type(batch).__name__
