"""Copies of weights that stand elsewhere, and the way back to them, whatever goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bdfast import ops
from bdfast.ops import Mode, Scope
from bdfast.ops.lists import (
    euclidean,
    laid_out_like,
    layouts,
    norm_along,
    rows,
    workable,
    write,
)


class Move(NamedTuple):
    """Parameters of one dtype on one device that one call of `bdfast.ops.perturb_` moves along their directions."""

    rho: float
    mode: Mode
    params: list[Tensor]
    directions: list[Tensor]


class SavedWeights:
    """Where the weights were: a copy of each parameter, made once and kept, and which copies count.

    A signal such as Ctrl-C arrives as soon as a kernel has returned, before Python knows of it. Whether a kernel has
    run is therefore read from the memory that it writes, where a mark stood before.

    Attributes:
        copies: The memory of each parameter that has ever been moved.
        moved: The parameters whose copies hold the weights to go back to.
    """

    def __init__(self) -> None:
        self.copies: dict[Tensor, Tensor] = {}
        self.moved: list[Tensor] = []
        self._writing: tuple[list[Tensor], Tensor | None] | None = None
        self._ids: list[int] = []
        self._layouts: object = None
        self._memory: list[Tensor] = []

    def perturb(
        self, moves: Sequence[Move], *, scope: Scope, norm: Tensor | None = None, eps: float = 1e-12
    ) -> list[Tensor]:
        """Save the parameters and move them; returns the norms, as `bdfast.ops.perturb_` does, one per move."""
        params = [param for move in moves for param in move.params]
        works, copied = workable(params)
        memory = self._memory_for(params, works)
        calls, begin = [], 0
        for move in moves:
            end = begin + len(move.params)
            dirs = [laid_out_like(x.detach(), work) for x, work in zip(move.directions, works[begin:end], strict=True)]
            calls.append((move, rows(works[begin:end]), rows(dirs), rows(memory[begin:end])))
            begin = end
        if norm is None and scope == "global" and len(calls) > 1:
            norm = euclidean([norm_along(move.mode, moving, dirs) for move, moving, dirs, _ in calls])
        norms = []
        for move, moving, dirs, saved in calls:
            self._writing = move.params, mark(saved)
            known = None if norm is None else norm.to(moving[0].device)
            options = {"rho": move.rho, "mode": move.mode, "scope": scope, "eps": eps, "norm": known}
            norms.append(ops.perturb_(moving, dirs, saved, **options))  # type: ignore[arg-type]
            self.moved = [*self.moved, *move.params]
            self._writing = None
        write(copied)
        return norms

    def save(self, params: Sequence[Tensor]) -> None:
        """Copy the parameters as they stand."""
        if params:
            works, _ = workable(params)
            torch._foreach_copy_(self._memory_for(params, works), works)
            known = set(self.moved)
            self.moved = [*self.moved, *(param for param in params if param not in known)]

    def of(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The copies of these parameters."""
        return self._memory if [*map(id, params)] == self._ids else [self.copies[param] for param in params]

    def put_back(self, params: Sequence[Tensor] | None = None) -> None:
        """Write the copies of these parameters back, by default of all that moved; they still count as moved."""
        if self._writing is not None:
            begun, marked = self._writing
            if not is_marked(marked):
                self.moved = [*self.moved, *begun]
            self._writing = None
        back = self.moved if params is None else params
        write([*zip(back, self.of(back), strict=True)])

    def forget(self) -> None:
        """None of the copies counts any more."""
        self.moved, self._writing = [], None

    def _memory_for(self, params: Sequence[Tensor], works: list[Tensor]) -> list[Tensor]:
        """Anew where a parameter has changed its dtype, device, shape or memory format."""
        ids, laid_out = [*map(id, params)], layouts(works)
        if ids == self._ids and laid_out == self._layouts:
            return self._memory
        memory = []
        for param, work in zip(params, works, strict=True):
            copy = self.copies.get(param)
            if copy is None or layouts([copy]) != layouts([work]):
                copy = torch.empty_like(work)
            memory.append(copy)
        self._ids, self._layouts, self._memory = ids, laid_out, memory
        self.copies.update(zip(params, memory, strict=True))
        return memory


def mark(tensors: Sequence[Tensor]) -> Tensor | None:
    """Mark a list that a kernel is about to write; returns where the mark is, None if there is nothing to write."""
    for x in tensors:
        if x.numel():
            head = x.detach().as_strided((1,), (1,)).view(torch.uint8)
            head.fill_(_MARK)
            return head
    return None


def is_marked(head: Tensor | None) -> bool:
    """Whether the mark still stands there: no kernel has written then."""
    return head is not None and bool((head == _MARK).all())


_MARK = 255
"""In every byte: a NaN in all dtypes, and none that arithmetic makes."""
