"""Where tensors lie in memory: addresses that kernels cannot use, and memory that is reached in more than one way.

What an op writes may be reached through nothing else in the call, with one exception: entry i of some lists may be the
very tensor that entry i of `params` is. Everything else would give results that depend on the number of threads.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

# PyTorch itself can copy a tensor whose address is no multiple of its item size. On a GPU the copy would be an error
# that ends the CUDA context.
COPIED_ON = ("cpu",)
# How long to look for an element that two strided views share; beyond it they count as overlapping.
_MAX_WORK = 10_000


def address(x: Tensor) -> int | None:
    """Of the first element; None where there is none: traced, fake, meta and wrapped tensors, and empty ones."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta or not x.numel():
        return None
    try:
        return x.data_ptr()
    except RuntimeError:  # inside torch.func.vmap and grad
        return None


def as_readable(x: Tensor) -> Tensor:
    """The tensor, or a copy where its numbers do not lie in memory as they are, each at a multiple of its size."""
    at = address(x)
    return x if at is None or (at % x.itemsize == 0 and not x.is_neg()) else x.clone()


def check_address(op: str, name: str, x: Tensor) -> None:
    """There is memory, and what lies at no multiple of the item size can be copied."""
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
    """One tensor of a call, and the addresses from its first byte to the one after its last."""

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
    """What is written shares no memory with anything else.

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
    """The second look, at tensors whose ranges meet: views may lie between each other and share nothing."""
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
                # What is only read is blamed, as a copy can replace it; else the later of the two.
                shared.append(sorted((use, other), key=lambda x: (not x.written, place(x)), reverse=True))
        meeting.append((use, view))
    if shared:
        blamed, other = min(shared, key=lambda pair: (place(pair[0]), place(pair[1])))
        _explain(op, blamed, other)


def _may_share(a: np.ndarray, b: np.ndarray) -> bool:
    return np.may_share_memory(a, b, max_work=_MAX_WORK)  # type: ignore[arg-type]  # the stub knows two numbers


class _View:
    """For numpy, which can tell whether two strided arrays share an element; it reads none."""

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
