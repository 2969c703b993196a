"""The step of any base optimizer, and how to undo it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Its step without its hooks, which are also those of the optimizer around it, and have been called."""
    step: Any = type(optimizer).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)


class Snapshot:
    """A context around a step of the base: if it fails, state and options are restored. The caller restores weights.

    A base such as Adam overwrites its state tensor by tensor, so the state is copied first.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [dict(group) for group in optimizer.param_groups]
        self._state: dict[Tensor, tuple[Any, Any]] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        for param, values in optimizer.state.items():
            leaves, structure = tree_flatten(dict(values))
            self._state[param] = leaves, structure
            self._copies += [(x, x.detach().clone()) for x in leaves if isinstance(x, Tensor)]

    def __enter__(self) -> None:
        pass

    @torch.no_grad()
    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        if error is None:
            return
        for x, copy in self._copies:
            x.copy_(copy)
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.clear()
            group.update(before)
        state = self._optimizer.state
        for param in [param for param in state if param not in self._state]:
            del state[param]
        for param, (leaves, structure) in self._state.items():
            state[param] = tree_unflatten(leaves, structure)
