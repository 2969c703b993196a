"""Checks of arguments, made before anything is read or written; the checks of memory are in `aliasing`.

Fast comparisons of whole lists come first. Only if one of them fails, a slower loop finds the argument and the index
for the message.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NoReturn

import torch
from torch import Tensor

from bdfast.errors import nearest
from bdfast.ops import aliasing

Lists = dict[str, list[Tensor]]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def as_list(op: str, name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors as a list. A single tensor is refused, because iterating over it would yield its rows."""
    if isinstance(tensors, Tensor):
        raise TypeError(f"{op}: {name}: expected a list of tensors, got a single tensor; write [{name}].")
    return list(tensors)


def check_lists(op: str, lists: Lists) -> None:
    """Equal lengths, shapes and strides; one floating dtype; one device; strided tensors with a dimension."""
    (first_name, first), *others = lists.items()
    for name, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(
                f"{op}: {name}: expected {len(first)} tensors like {first_name}, got {len(tensors)}; pass lists that "
                "belong to the same parameters."
            )
    everything = list(chain.from_iterable(lists.values()))
    for x in everything:
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            _explain_kind(op, lists)
    if not first:
        return
    shapes = [x.shape for x in first]
    if (
        first[0].dtype not in _DTYPES
        or len({x.dtype for x in everything}) > 1
        or len({x.device for x in everything}) > 1
        or not all(shapes)
        or any([x.shape for x in tensors] != shapes for _, tensors in others)
    ):
        _explain_difference(op, lists)
    if others and not all(map(Tensor.is_contiguous, everything)):
        _check_strides(op, lists)
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            aliasing.check_address(op, f"{name}[{i}]", x)


def check_vector(op: str, name: str, vector: Tensor, dtype: torch.dtype, like: tuple[str, list[Tensor]]) -> None:
    """One value per row of the list `like`, of this dtype, on its device."""
    check_tensor(op, name, vector, dtype, like)
    rows = sum([x.shape[0] for x in like[1]])
    if vector.shape != (rows,):
        raise ValueError(
            f"{op}: {name}: expected shape [{rows}], one value per row of all tensors in {like[0]}, got "
            f"{list(vector.shape)}; count the rows (dimension 0) over the whole list."
        )


def check_tensor(op: str, name: str, x: Tensor, dtype: torch.dtype, like: tuple[str, list[Tensor]]) -> None:
    """A tensor of this dtype on the device of the list `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name}: expected a {dtype} tensor, got a {type(x).__name__}; use torch.as_tensor.")
    if x.dtype is not dtype:
        raise TypeError(f"{op}: {name}: expected dtype {dtype}, got {x.dtype}; call {name}.to({dtype}).")
    like_name, tensors = like
    if tensors and x.device != tensors[0].device:
        raise ValueError(
            f"{op}: {name}: expected device {tensors[0].device} like {like_name}, got {x.device}; "
            f"call {name}.to({like_name}[0].device)."
        )
    aliasing.check_address(op, name, x)


def check_writable(op: str, name: str, tensors: list[Tensor]) -> None:
    """No two elements of a tensor share memory."""
    for i, x in enumerate(tensors):
        if not x.is_contiguous() and _may_overlap(x):
            raise ValueError(
                f"{op}: {name}[{i}]: expected memory of its own for every element, got strides {x.stride()} for shape "
                f"{list(x.shape)}; write into {name}[{i}].clone()."
            )


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """The value is one of the choices of the option."""
    if value not in choices:
        raise ValueError(
            f"{op}: {name}: expected one of {', '.join(choices)}, got {value!r}; {nearest(str(value), choices)}"
        )


def rows_are_dense(x: Tensor) -> bool:
    """Whether each row is one contiguous block of memory, in any order inside, and the blocks are adjacent."""
    if x.is_contiguous():
        return True
    columns = x.numel() // x.shape[0]
    return (x.shape[0] == 1 or x.stride(0) == columns) and _span(strides(x[0])) == columns


def make_readable(lists: Lists, written: Sequence[str] = ()) -> list[tuple[Tensor, Tensor]]:
    """Replace tensors that no kernel can read (transposed views, unaligned addresses, negated views) by copies.

    Returns:
        (original, copy) for each replaced tensor of the lists named in `written`, to copy the results back.
    """
    copied = []
    for i, lead in enumerate(next(iter(lists.values()))):
        dense = rows_are_dense(lead)
        for name, tensors in lists.items():
            original = tensors[i]
            tensors[i] = (
                aliasing.as_readable(original) if dense else original.clone(memory_format=torch.contiguous_format)
            )
            if name in written and tensors[i] is not original:
                copied.append((original, tensors[i]))
    return copied


def strides(x: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions with more than one index; empty for a tensor without elements."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]


def _span(strides: list[tuple[int, int]]) -> int | None:
    """The length of the contiguous memory block that these dimensions fill; None if they leave gaps."""
    span = 1
    for stride, size in sorted(strides):
        if stride != span:
            return None
        span *= size
    return span


def _may_overlap(x: Tensor) -> bool:
    reach = 1
    for stride, size in sorted(strides(x)):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def _check_strides(op: str, lists: Lists) -> None:
    first_name, first = next(iter(lists.items()))
    for name, tensors in lists.items():
        for i, (x, expected) in enumerate(zip(tensors, first, strict=True)):
            if strides(x) != strides(expected):
                raise ValueError(
                    f"{op}: {name}[{i}]: expected strides {expected.stride()} like {first_name}[{i}], got "
                    f"{x.stride()}; call .contiguous() on both, or give both one memory format."
                )


def _explain_kind(op: str, lists: Lists) -> NoReturn:
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if not isinstance(x, Tensor):
                advice = "leave out parameters that have no gradient" if x is None else "pass tensors only"
                raise TypeError(f"{op}: {name}[{i}]: expected a tensor, got a {type(x).__name__}; {advice}.")
            if x.layout is not torch.strided:
                raise TypeError(
                    f"{op}: {name}[{i}]: expected layout {torch.strided}, got {x.layout}; call {name}[{i}].to_dense()."
                )
    raise AssertionError("unreachable: the caller has seen such a tensor")


def _explain_difference(op: str, lists: Lists) -> NoReturn:
    first_name, first = next(iter(lists.items()))
    lead = first[0]
    if lead.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: {first_name}[0]: expected dtype float32, bfloat16, float16 or float64, got {lead.dtype}; leave out "
            "buffers and quantised weights."
        )
    for name, tensors in lists.items():
        for i, (x, expected) in enumerate(zip(tensors, first, strict=True)):
            if x.dtype != lead.dtype:
                raise TypeError(
                    f"{op}: {name}[{i}]: expected dtype {lead.dtype} like {first_name}[0], got {x.dtype}; convert it, "
                    "or call once per dtype."
                )
            if x.device != lead.device:
                raise ValueError(
                    f"{op}: {name}[{i}]: expected device {lead.device} like {first_name}[0], got {x.device}; move it, "
                    "or call once per device."
                )
            if x.ndim == 0:
                raise ValueError(
                    f"{op}: {name}[{i}]: expected at least one dimension, the neurons, got none; pass "
                    f"{name}[{i}].reshape(1) or leave it out."
                )
            if x.shape != expected.shape:
                raise ValueError(
                    f"{op}: {name}[{i}]: expected shape {list(expected.shape)} like {first_name}[{i}], got "
                    f"{list(x.shape)}; pass the lists in the same order."
                )
    raise AssertionError("unreachable: the caller has seen a difference")
