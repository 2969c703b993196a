"""Activation pruning: units that are least, or most, active on clean images are switched off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batches
from bdfast.defenses.parts.classifier import classifier_of
from bdfast.detectors.exposures.standing import Ended
from bdfast.training import Run
from bdfast.training.copies import copy_of
from bdfast.training.modes import eval_mode

Direction = Literal["least", "most"]

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the units that are tried, as published, without 0."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def pruned(
    model: nn.Module,
    images: Batches,
    run: Run,
    *,
    direction: Direction,
    layer: str | None,
    ended: Ended,
    shares: Sequence[float] = SHARES,
) -> nn.Module:
    """A copy in which the first share of the units at which `ended` says so is switched off, or the largest share.

    Args:
        model: Only read.
        images: Clean images.
        run: Precision and `forward`.
        direction: Which units go first.
        layer: Name of a linear or convolution layer, whose outputs are the units. None for the inputs of the last
            linear layer, the features before the classifier.
        ended: Asked after every share.
        shares: In ascending order.

    Raises:
        ValueError: There is no such layer, or its weight is no parameter of its own.
    """
    copy = copy_of(model)
    name = classifier_of(copy, images, run) if layer is None else layer
    module = dict(copy.named_modules()).get(name)
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or "weight" not in module._parameters:
        raise ValueError(
            f"layer: expected the name of a linear or convolution layer with a weight of its own, got {name!r}, which "
            f"is {type(module).__name__}; see model.named_modules()."
        )
    order = activity(copy, module, images, run, inputs=layer is None).argsort(
        descending=direction == "most", stable=True
    )
    for share in shares:
        _switch_off(module, order[: round(share * len(order))], inputs=layer is None)
        if ended(copy):
            break
    return copy


def activity(model: nn.Module, module: nn.Module, images: Batches, run: Run, *, inputs: bool) -> Tensor:
    """Mean absolute input or output of each unit of a layer, [U] float32 or more, over images and positions.

    Of features that are not negative, such as those after a ReLU, it is the published mean.
    """
    total: Tensor | None = None
    count = 0

    def see(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total, count
        values = task.at_least_float32(given[0] if inputs else output).abs()
        axis = values.ndim - 1
        if isinstance(module, CONVOLUTIONS):
            axis -= len(module.kernel_size)
        units = values.movedim(axis, -1).flatten(0, -2)
        total = units.sum(0) if total is None else total + units.sum(0)
        count += len(units)

    handle = module.register_forward_hook(see)
    try:
        with eval_mode(model), torch.no_grad(), run.autocast(images.device):
            for batch in images.ordered():
                run.forward(model, batch)
    finally:
        handle.remove()
    if total is None:
        raise ValueError(f"layer: expected a layer that runs in a forward pass, got {module}; name another one.")
    return total / count


@torch.no_grad()
def _switch_off(module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, units: Tensor, *, inputs: bool) -> None:
    if inputs:
        module.weight[:, units] = 0
        return
    module.weight[units] = 0
    if module.bias is not None:
        module.bias[units] = 0
