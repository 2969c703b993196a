"""What goes into the last layer of a network: how active each feature is, and the features themselves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batches
from bdfast.training import Run
from bdfast.training.modes import eval_mode


def mean_activations(model: nn.Module, layer: str, data: Batches, run: Run) -> Tensor:
    """The mean absolute value [D], float64, of every feature that goes into a layer, from one pass over the data.

    Args:
        model: Any network; only read.
        layer: Name of a linear layer whose outputs are the logits.
        data: Clean data, read as it is, with the network in eval mode.
        run: Gives the forward pass and the precision.
    """
    total: Tensor | None = None
    count = 0
    for features, _ in _passes(model, layer, data, run):
        activity = features.abs().sum(0, dtype=torch.float64)
        total = activity if total is None else total + activity
        count += len(features)
    assert total is not None
    return total / count


def features_into(model: nn.Module, layer: str, data: Batches, run: Run) -> tuple[Tensor, Tensor]:
    """The features [N, D] themselves, and the targets [N] of their logits, in the order of the data."""
    features, targets = zip(*_passes(model, layer, data, run), strict=True)
    return torch.cat(features), torch.cat(targets)


def _passes(model: nn.Module, layer: str, data: Batches, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch the features [N, D] and targets [N] of its predictions, without those that do not count."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(args[0] if args else kwargs["input"])

    handle = model.get_submodule(layer).register_forward_pre_hook(see, with_kwargs=True)
    try:
        with eval_mode(model), torch.no_grad():
            for batch in data.ordered():
                with run.autocast(data.device):
                    targets = run.forward(model, batch)[1].flatten()
                counted = targets != task.IGNORED
                yield seen.pop().flatten(0, -2)[counted], targets[counted]
    finally:
        handle.remove()
