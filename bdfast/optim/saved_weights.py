"""Copies of weights that are moved for a while, from which they are restored, also after an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bdfast import ops
from bdfast.ops import Mode, Scope, aliasing, checks
from bdfast.ops.lists import (
    euclidean,
    laid_out_like,
    lay_out,
    norm_along,
    places_of,
    rows,
    workable,
    write,
)

_MARK = 255
"""The value of every marked byte: a NaN in all dtypes, with bits that no arithmetic gives."""


class Move(NamedTuple):
    """Parameters of one dtype on one device that one call of `bdfast.ops.perturb_` moves along their directions."""

    rho: float
    mode: Mode
    params: list[Tensor]
    directions: list[Tensor]


class Laid(NamedTuple):
    """Parameters as the ops take them.

    Attributes:
        works: One tensor for each, see `bdfast.ops.lists.workable`.
        copied: Those that have to be written back.
        copies: The memory where each is saved.
    """

    works: list[Tensor]
    copied: list[tuple[Tensor, Tensor]]
    copies: list[Tensor]


class SavedWeights:
    """A copy of each parameter, made once and kept, and a list of the parameters that have to be restored.

    A signal such as Ctrl-C can stop Python right after a kernel has returned, before the next statement. So whether a
    kernel has run is read from the memory that it writes: a mark is written there before the call.

    Attributes:
        copies: The memory of each parameter that has ever been moved.
        moved: The parameters whose copies hold the weights to restore.
    """

    def __init__(self) -> None:
        self.copies: dict[Tensor, Tensor] = {}
        self.moved: list[Tensor] = []
        self._writing: tuple[list[Tensor], Tensor | None] | None = None
        self._laid: Laid | None = None
        self._ids: list[int] = []
        self._places: object = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_laid": None}  # refers to the parameters of this object

    def perturb(
        self, moves: Sequence[Move], *, scope: Scope, norm: Tensor | None = None, eps: float = 1e-12
    ) -> list[Tensor]:
        """Save the parameters and move them; returns the norms, as `bdfast.ops.perturb_` does, one per move."""
        params = [param for move in moves for param in move.params]
        works, copied, copies = self.laid(params)
        calls, begin = [], 0
        for move in moves:
            end = begin + len(move.params)
            dirs = lay_out(move.directions, works[begin:end])
            calls.append((move, rows(works[begin:end]), rows(dirs), rows(copies[begin:end])))
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
        """Copy the parameters, to restore these values from now on."""
        if params:
            works, _, copies = self.laid(params)
            torch._foreach_copy_(copies, works)
            known = set(self.moved)
            self.moved = [*self.moved, *(param for param in params if param not in known)]

    def laid(self, params: Sequence[Tensor]) -> Laid:
        """The parameters as the ops take them, made anew if a dtype, device, shape or memory format has changed."""
        ids, places = [*map(id, params)], places_of(params)
        if self._laid is not None and ids == self._ids and places == self._places:
            return self._laid
        # The ops see one call at a time, and copies in the place of strided views.
        strided = [param.detach() for param in params if param.layout is torch.strided]
        checks.check_writable("step", "params", strided)
        aliasing.check_apart("step", {"params": strided}, ["params"])
        works, copied = workable(params)
        moved = set(self.moved)
        for param, work in zip(params, works, strict=True):
            copy = self.copies.get(param)
            if copy is None or (copy.shape != work.shape and param not in moved):
                copy = torch.empty_like(work)
            self.copies[param] = laid_out_like(copy, work, "weights before the step")
        laid = Laid(works, copied, [self.copies[param] for param in params])
        # `works` keeps this memory allocated, so no other tensor can get these addresses.
        self._laid, self._ids, self._places = None if copied else laid, ids, places
        return laid

    def put_back(self, params: Sequence[Tensor] | None = None) -> bool:
        """Restore these parameters, by default all in `moved`, which is left as it is.

        Returns:
            Whether there was any parameter to restore.
        """
        if self._writing is not None:
            begun, marked = self._writing
            if not is_marked(marked):
                self.moved = [*self.moved, *begun]
            self._writing = None
        back = self.moved if params is None else params
        if back:
            with torch.no_grad():
                write([(param, self.copies[param]) for param in back])
        return bool(back)

    def forget(self) -> None:
        """Nothing has to be restored any more."""
        self.moved, self._writing = [], None


def mark(tensors: Sequence[Tensor]) -> Tensor | None:
    """Mark the memory that a kernel is about to write; returns the marked bytes, None if all tensors are empty."""
    for x in tensors:
        if x.numel():
            head = x.detach().as_strided((1,), (1,)).view(torch.uint8)
            head.fill_(_MARK)
            return head
    return None


def is_marked(head: Tensor | None) -> bool:
    """Whether the mark is still there, so that no kernel has written."""
    return head is not None and bool((head == _MARK).all())
