"""The step of `torch.optim.SGD` as one pass over memory that starts from the saved weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdfast import ops
from bdfast.ops.lists import euclidean, grouped, kind, laid_out_like, or_zeros, with_rows, write
from bdfast.optim.saved_weights import is_marked, mark


@dataclass
class _Call:
    """One call of `bdfast.ops.sharp_step_`, and whether it was made, also where it did not return."""

    lists: dict[str, list[Tensor] | None]
    options: dict[str, Any]
    _begun: bool = False
    _marked: Tensor | None = None

    def make(self) -> Tensor | None:
        params = self.lists["params"]
        assert params is not None
        self._marked = mark(params)
        self._begun = True
        return ops.sharp_step_(**self.lists, **self.options)  # type: ignore[arg-type]

    def made(self) -> bool:
        return self._begun and not is_marked(self._marked)


class FusedSGD:
    """A step that makes one call for all parameters that share options, dtype and device.

    Everything is made and looked at first. Once a call has written, the old momentum is lost: what is interrupted then
    has to be finished.

    Args:
        state: Of the optimizer; holds the momentum as `torch.optim.SGD` keeps it.
        stepping: T parameters, each with its group of options.
        works: T tensors: the parameters as the ops take them, see `bdfast.ops.lists.workable`.
        copied: Those that have to be written back.
        saved: T tensors: the weights to start from.
        seconds: T tensors: the gradients at the perturbed weights.
        firsts: T tensors: those at the saved ones, where they are mixed in.
        references: T tensors to return the distance to, or None.
        alpha: Share of `seconds`.
    """

    def __init__(
        self,
        state: dict[Tensor, Any],
        stepping: list[tuple[dict[str, Any], Tensor]],
        works: list[Tensor],
        copied: list[tuple[Tensor, Tensor]],
        saved: list[Tensor],
        seconds: list[Tensor],
        firsts: list[Tensor] | None,
        references: list[Tensor | None],
        *,
        alpha: float,
    ) -> None:
        params = [param for _, param in stepping]
        keys = []
        for (group, param), work in zip(stepping, works, strict=True):
            # torch's SGD leaves the dampening out of the first step.
            fresh = state.get(param, {}).get("momentum_buffer") is None
            numbers = [float(group[name]) for name in ("lr", "momentum", "nesterov", "weight_decay", "maximize")]
            keys.append((*numbers, 0.0 if fresh else group["dampening"], *kind(work)))
        self._calls: list[_Call] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        for key, places in grouped(zip(keys, range(len(keys)), strict=True)).items():
            lr, momentum, nesterov, weight_decay, maximize, dampening, *_ = key
            there = [laid_out_like(x, works[i], "reference") for i in places if (x := references[i]) is not None]
            buffers = [
                or_zeros(state.get(params[i], {}).get("momentum_buffer"), works[i], "momentum_buffer")
                for i in places
                if momentum
            ]
            self._buffers += zip([params[i] for i in places], buffers, strict=False)
            lists: dict[str, list[Tensor] | None] = {
                "params": [works[i] for i in places],
                "saved": [laid_out_like(saved[i], works[i], "weights before the step") for i in places],
                "grads": [seconds[i] for i in places],
                "momentum_buffers": buffers or None,
                "first_grads": None if firsts is None else [firsts[i] for i in places],
                "reference": there or None,
            }
            options = {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "nesterov": bool(nesterov),
                "weight_decay": weight_decay,
                "alpha": alpha,
                "maximize": bool(maximize),
            }
            rows = {name: None if xs is None else [with_rows(x) for x in xs] for name, xs in lists.items()}
            self._calls.append(_Call(rows, options))
        self._state, self._copied = state, copied

    def take(self) -> Tensor | None:
        """Take the step.

        Returns:
            [] the distance of the new weights to the references, over all of them; None without.
        """
        squared = [x for call in self._calls if (x := call.make()) is not None]
        self._settle()
        return euclidean([torch.sqrt(x) for x in squared]) if squared else None

    def begun(self) -> bool:
        """Whether any call has written, so that there is no way back."""
        return any(call.made() for call in self._calls)

    def finish(self) -> None:
        """The rest of a step that was interrupted."""
        for call in self._calls:
            if not call.made():
                call.make()
        self._settle()

    def _settle(self) -> None:
        write(self._copied)
        for param, buffer in self._buffers:
            self._state[param]["momentum_buffer"] = buffer
