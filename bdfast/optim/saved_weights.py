"""Copies of weights that stand elsewhere, and the way back to them, whatever goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bdfast import ops
from bdfast.ops import Mode, Scope, checks
from bdfast.ops.lists import (
    alike,
    euclidean,
    grouped,
    kind,
    laid_out_like,
    norm_along,
    with_rows,
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

    def perturb(
        self, moves: Sequence[Move], *, scope: Scope, norm: Tensor | None = None, eps: float = 1e-12
    ) -> list[Tensor]:
        """Save the parameters and move them; returns the norms, as `bdfast.ops.perturb_` does, one per move."""
        calls = []
        for move in moves:
            works, copied = workable(move.params)
            dirs = [with_rows(laid_out_like(x.detach(), work)) for x, work in zip(move.directions, works, strict=True)]
            saved = [with_rows(self._memory(param, work)) for param, work in zip(move.params, works, strict=True)]
            calls.append((move, copied, [with_rows(work) for work in works], dirs, saved))
        if norm is None and scope == "global" and len(calls) > 1:
            norm = euclidean([norm_along(move.mode, works, dirs) for move, _, works, dirs, _ in calls])
        norms = []
        for move, copied, works, dirs, saved in calls:
            known = None if norm is None else norm.to(works[0].device)
            self._writing = move.params, mark(saved)
            norms.append(
                ops.perturb_(works, dirs, saved, rho=move.rho, mode=move.mode, scope=scope, eps=eps, norm=known)
            )
            write(copied)
            self.moved = [*self.moved, *move.params]
            self._writing = None
        return norms

    def save(self, params: Sequence[Tensor]) -> None:
        """Copy the parameters as they stand.

        Raises:
            ValueError, TypeError: No kernel takes one of them; nothing has been changed.
        """
        if not params:
            return
        works, _ = workable(params)
        for group in grouped((kind(work), with_rows(work)) for work in works).values():
            checks.check_lists("step", {"params": group})
            checks.check_writable("step", "params", group)
        torch._foreach_copy_([self._memory(param, work) for param, work in zip(params, works, strict=True)], works)
        known = set(self.moved)
        self.moved = [*self.moved, *(param for param in params if param not in known)]

    def put_back(self, params: Sequence[Tensor] | None = None) -> None:
        """Write the copies of these parameters back, by default of all that moved; they still count as moved."""
        if self._writing is not None:
            begun, marked = self._writing
            if not is_marked(marked):
                self.moved = [*self.moved, *begun]
            self._writing = None
        write([(param, self.copies[param]) for param in (self.moved if params is None else params)])

    def forget(self) -> None:
        """None of the copies counts any more."""
        self.moved, self._writing = [], None

    def _memory(self, param: Tensor, work: Tensor) -> Tensor:
        """Anew where the parameter has changed its dtype, device, shape or memory format."""
        copy = self.copies.get(param)
        if copy is None or copy.shape != work.shape or not alike(copy, work):
            copy = self.copies[param] = torch.empty_like(work)
        return copy


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
