"""Copies of networks that `copy.deepcopy` refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def copy_of(model: Model) -> Model:
    """A deep copy of a network.

    Tensors that still hang on a graph, such as features that a network keeps of its last pass, are detached in the
    copy. What cannot be copied at all, such as a lock or a logger, is shared with the original.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            for tensor in _tensors(value):
                if tensor.grad_fn is not None:
                    memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, dict(memo))
    except TypeError:
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in ("_parameters", "_buffers", "_modules") and not _copies(value):
                    memo[id(value)] = value
        return copy.deepcopy(model, memo)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from _tensors(part)


def _copies(value: Any) -> bool:
    if isinstance(value, nn.Module) or (not hasattr(value, "__dict__") and isinstance(value, int | float | str | bool)):
        return True
    try:
        copy.deepcopy(value)
    except TypeError:
        return False
    except RuntimeError:  # a tensor on a graph, which the caller detaches
        return True
    return True
