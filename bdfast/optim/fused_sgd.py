"""The step of `torch.optim.SGD` as one pass over memory that starts from the saved weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdfast import ops
from bdfast.ops import checks
from bdfast.ops.lists import euclidean, grouped, lay_out, rows, write
from bdfast.optim.saved_weights import Laid, is_marked, mark


@dataclass
class _Call:
    """One call of `bdfast.ops.sharp_step_`, and whether it has written, also where an error came before its result."""

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

    def check(self) -> None:
        """Raise what the op would raise about a shape, before another call has written."""
        lists = {name: xs for name, xs in self.lists.items() if xs is not None}
        shapes = [[x.shape for x in xs] for xs in lists.values()]
        if any(x != shapes[0] for x in shapes):
            checks.check_lists("sharp_step_", lists)

    def made(self) -> bool:
        return self._begun and not is_marked(self._marked)


class FusedSGD:
    """A step that makes one call for all parameters that share options, dtype and device.

    All lists are made and checked first. Once a call has written, the old momentum is lost: a step that is interrupted
    after that has to be finished.

    Args:
        state: Of the optimizer; holds the momentum as `torch.optim.SGD` keeps it.
        stepping: T parameters, each with its group of options.
        laid: The parameters as the ops take them, and the weights to start from.
        seconds: T tensors: the gradients at the perturbed weights.
        firsts: T tensors: those at the saved ones, where they are mixed in.
        references: T tensors to return the distance to, or None.
        alpha: Share of `seconds`.
    """

    def __init__(
        self,
        state: dict[Tensor, Any],
        stepping: list[tuple[dict[str, Any], Tensor]],
        laid: Laid,
        seconds: list[Tensor],
        firsts: list[Tensor] | None,
        references: list[Tensor | None],
        *,
        alpha: float,
    ) -> None:
        works, copied, saved = laid
        held = [state.get(param, _NOTHING).get("momentum_buffer") for _, param in stepping]
        # Groups with the same numbers share calls.
        numbers = {id(group): _numbers(group) for group in {id(group): group for group, _ in stepping}.values()}
        # torch's SGD leaves the dampening out of the first step.
        keys = [
            (numbers[id(group)][buffer is None], work.dtype, work.device)
            for (group, _), buffer, work in zip(stepping, held, works, strict=True)
        ]
        self._calls: list[_Call] = []
        self._new_buffers: list[tuple[Tensor, Tensor]] = []
        for key, places in grouped(zip(keys, range(len(keys)), strict=True)).items():
            lr, momentum, nesterov, weight_decay, maximize, dampening = key[0]
            params = [works[i] for i in places]
            there = [x for i in places if (x := references[i]) is not None]
            buffers = lay_out([held[i] for i in places], params, "momentum_buffer") if momentum else []
            self._new_buffers += [
                (stepping[i][1], x) for i, x in zip(places, buffers, strict=False) if x is not held[i]
            ]
            lists = {
                "params": rows(params),
                "saved": rows([saved[i] for i in places]),
                "grads": rows([seconds[i] for i in places]),
                "momentum_buffers": rows(buffers) or None,
                "first_grads": None if firsts is None else rows([firsts[i] for i in places]),
                "reference": rows(lay_out(there, params, "reference")) if there else None,
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
            self._calls.append(_Call(lists, options))
        self._state, self._copied = state, copied
        if len(self._calls) > 1:
            for call in self._calls:
                call.check()

    def take(self) -> Tensor | None:
        """Take the step.

        Returns:
            [] the distance of the new weights to the references, over all of them; None without.
        """
        squared = [x for call in self._calls if (x := call.make()) is not None]
        self._settle()
        return euclidean([torch.sqrt(x) for x in squared]) if squared else None

    def begun(self) -> bool:
        """Whether any call has written, so that the step can only be finished."""
        return any(call.made() for call in self._calls)

    def finish(self) -> None:
        """Make the calls that an interruption has left out."""
        for call in self._calls:
            if not call.made():
                call.make()
        self._settle()

    def _settle(self) -> None:
        write(self._copied)
        for param, buffer in self._new_buffers:
            self._state.setdefault(param, {})["momentum_buffer"] = buffer


_NOTHING: dict[str, Tensor] = {}


def _numbers(group: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Those of the group, with its dampening and without."""
    numbers = [float(group[name]) for name in ("lr", "momentum", "nesterov", "weight_decay", "maximize")]
    return (*numbers, group["dampening"]), (*numbers, 0.0)
