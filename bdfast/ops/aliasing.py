"""Checks of memory: addresses that kernels cannot use, and overlap between the tensors of a call.

Memory that an op writes must belong to one tensor of the call. There is one exception: in some lists, entry i may be
the same tensor as entry i of `params`. Any other overlap would give results that depend on the number of threads.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

# On these devices PyTorch can copy a tensor whose address is not a multiple of its item size. On a GPU such a copy
# fails and makes the CUDA context unusable.
COPIED_ON = ("cpu",)
# Limit on the search for an element that two strided views share. Beyond it they are treated as overlapping.
_MAX_WORK = 10_000


def address(x: Tensor) -> int | None:
    """The address of the first element; None for empty, meta, fake, traced and wrapped tensors."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or not x.numel():
        return None
    try:
        return x.data_ptr()
    except RuntimeError:  # inside torch.func.vmap and grad
        return None


def as_readable(x: Tensor) -> Tensor:
    """The tensor; a copy if it is a negated view or its address is not a multiple of its item size."""
    at = address(x)
    return x if at is None or (at % x.itemsize == 0 and not x.is_neg()) else x.clone()


def check_address(op: str, name: str, x: Tensor) -> None:
    """Refuse tensors without memory, and unaligned addresses that `as_readable` cannot copy."""
    at = address(x)
    if at == 0:
        raise ValueError(
            f"{op}: {name}: expected a tensor with memory, got one at address 0; restore its storage, or leave it out."
        )
    if at is not None and at % x.itemsize and x.device.type not in COPIED_ON:
        raise ValueError(
            f"{op}: {name}: expected an address that is a multiple of {x.itemsize} bytes, got {at:#x}; copy the data "
            "into a new tensor."
        )


class _Use(NamedTuple):
    """One tensor of a call, with the address of its first byte and the address after its last byte."""

    begin: int
    end: int
    argument: str
    place: int | None
    tensor: Tensor
    written: bool

    @property
    def name(self) -> str:
        return self.argument if self.place is None else f"{self.argument}[{self.place}]"


def check_apart(
    op: str,
    lists: Mapping[str, Sequence[Tensor]],
    written: Sequence[str],
    *,
    same_as_first: Sequence[str] = (),
    vectors: Mapping[str, Tensor | None] | None = None,
) -> None:
    """Refuse overlap between memory that is written and the memory of any other tensor of the call.

    Args:
        op: Its name.
        lists: By the names of the arguments; equal in shapes and strides.
        written: Names of the lists that the op writes to.
        same_as_first: Names of lists whose entry i may be the same tensor as entry i of the first written list.
        vectors: The other tensors of the call, by the names of their arguments; all are only read.
    """
    first = lists[written[0]]
    exempt = {(name, i, at) for name in same_as_first for i, at in enumerate(map(address, first))}
    uses = []
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            at = address(x)
            if at is not None and (name, i, at) not in exempt:
                uses.append(_use(at, name, i, x, name in written))
    for name, vector in (vectors or {}).items():
        if vector is not None and (at := address(vector)) is not None:
            uses.append(_use(at, name, None, vector, False))
    uses.sort(key=lambda use: use.begin)
    end = written_end = 0
    for use in uses:
        if use.begin < (end if use.written else written_end):
            return _check_pairs(op, uses, list(lists))
        end = max(end, use.end)
        if use.written:
            written_end = max(written_end, use.end)
    return None


def _use(at: int, argument: str, place: int | None, x: Tensor, written: bool) -> _Use:
    items = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return _Use(at, at + items * x.itemsize, argument, place, x, written)


def _check_pairs(op: str, uses: Sequence[_Use], order: Sequence[str]) -> None:
    """Compare the tensors whose address ranges overlap: interleaved views may still share no element."""
    places = {name: place for place, name in enumerate(order)}

    def place(use: _Use) -> tuple[int, int]:
        return places.get(use.argument, len(places)), use.place or 0

    shared = []
    meeting: list[tuple[_Use, np.ndarray]] = []
    for use in uses:
        view = np.asarray(_View(use))
        meeting = [(other, its_view) for other, its_view in meeting if other.end > use.begin]
        for other, its_view in meeting:
            if (use.written or other.written) and _may_share(view, its_view):
                # Name the tensor that is only read, because a copy can replace it; otherwise the later one.
                shared.append(sorted((use, other), key=lambda x: (not x.written, place(x)), reverse=True))
        meeting.append((use, view))
    if shared:
        blamed, other = min(shared, key=lambda pair: (place(pair[0]), place(pair[1])))
        _explain(op, blamed, other)


def _may_share(a: np.ndarray, b: np.ndarray) -> bool:
    return np.may_share_memory(a, b, max_work=_MAX_WORK)  # type: ignore[arg-type]  # the stub allows only 0 and -1


class _View:
    """Lets numpy decide whether two strided arrays share an element. It does not read the memory."""

    def __init__(self, use: _Use) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (use.begin, True),
            "shape": tuple(use.tensor.shape),
            "strides": tuple(stride * use.tensor.itemsize for stride in use.tensor.stride()),
            "typestr": f"|V{use.tensor.itemsize}",
        }


def _explain(op: str, blamed: _Use, other: _Use) -> NoReturn:
    got = f"the memory of {other.name}" if blamed.begin == other.begin else f"memory that overlaps {other.name}"
    if blamed.argument == other.argument:
        raise ValueError(
            f"{op}: {blamed.name}: expected every parameter once, got {got}; leave out the second of tied parameters."
        )
    raise ValueError(
        f"{op}: {blamed.name}: expected memory of its own, since {other.argument} is overwritten, got {got}; pass "
        f"{blamed.name}.clone()."
    )
