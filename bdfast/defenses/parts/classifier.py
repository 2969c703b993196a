"""The last layer of a network: the linear one whose outputs are the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdfast.data.batches import Batches
from bdfast.training import Run
from bdfast.training.modes import eval_mode


def classifier_of(model: nn.Module, data: Batches, run: Run) -> str:
    """The name of that layer, found by a pass over a batch: names and order of modules say nothing.

    Raises:
        ValueError: There is none, or it runs more than once in a pass.
    """
    outputs: dict[str, list[Tensor]] = {}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: outputs.setdefault(name, []).append(output))
        for name, module in layers
    ]
    try:
        with eval_mode(model), torch.no_grad():
            logits = run.forward(model, next(iter(data.ordered())))[0]
    finally:
        for handle in handles:
            handle.remove()
    found = [name for name, values in outputs.items() if len(values) == 1 and _same(values[0], logits)]
    if not found:
        raise ValueError(
            f"model: expected a linear layer whose outputs are the logits, got none among the {len(layers)} linear "
            f"layers of a {type(model).__name__}; take a method that needs no such layer."
        )
    return found[-1]


def _same(output: Tensor, logits: Tensor) -> bool:
    return output.shape == logits.shape and torch.equal(output.to(logits.dtype), logits)


def trained_classifier(model: nn.Module, data: Batches, run: Run) -> tuple[str, nn.Linear]:
    """The same and the layer itself, for methods that write into its weight.

    Raises:
        ValueError: There is none, or its weight is frozen, shared with other layers or computed from others.
    """
    name = classifier_of(model, data, run)
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    weight = layer._parameters.get("weight")
    others = [
        f"{key}.{own}"
        for key, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if parameter is weight and module is not layer
    ]
    where = f"{name}.weight" if name else "weight"
    if weight is None:
        got = "is computed in every pass; make it a parameter with torch.nn.utils.parametrize.remove_parametrizations"
    elif not weight.requires_grad:
        got = "is frozen; call requires_grad_(True) on it"
    elif others:
        got = f"is {', '.join(others)} as well; give the layer one of its own"
    else:
        return name, layer
    raise ValueError(
        f"model: expected a classifier with a weight of its own that can be trained, since the method changes it, got "
        f"{where}, which {got}, or take another method."
    )
