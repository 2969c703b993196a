"""Other tensors in the place of parameters, so that gradients flow to what these tensors were made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the named parameters of `model` are these tensors, also where other names share them.

    Args:
        model: Any network.
        tensors: From the name of a parameter to a tensor of its shape.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    instead = {id(named[name]): tensor for name, tensor in tensors.items()}
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in instead
    ]
    try:
        for table, name, parameter in places:
            table[name] = instead[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for table, name, parameter in places:
            table[name] = parameter
