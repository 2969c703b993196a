"""All checks of arguments, made once, before anything is read or written; the kernels trust them.

Everything is compared in a few sweeps that cost a list comprehension each. Only after a sweep has found
something does a second look name the argument and the index.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NoReturn

import torch
from torch import Tensor

from bdfast.errors import nearest

Lists = dict[str, list[Tensor]]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def as_list(op: str, name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors as a list; a lone tensor is refused, as it would silently be taken apart row by row."""
    if isinstance(tensors, Tensor):
        raise TypeError(f"{op}: {name} is a single tensor, expected a list of tensors; write [{name}].")
    return list(tensors)


def check_lists(op: str, lists: Lists) -> None:
    """Equal lengths, shapes and strides; one floating dtype; one device; strided tensors with a dimension."""
    (first_name, first), *others = lists.items()
    for name, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(
                f"{op}: {name} has {len(tensors)} tensors, expected {len(first)} like {first_name}; "
                "pass lists that belong to the same parameters."
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


def check_vector(op: str, name: str, vector: Tensor, dtype: torch.dtype, like: tuple[str, list[Tensor]]) -> None:
    """One value per row of the list `like`, of this dtype, on its device."""
    check_tensor(op, name, vector, dtype, like)
    rows = sum([x.shape[0] for x in like[1]])
    if vector.shape != (rows,):
        raise ValueError(
            f"{op}: {name} has shape {list(vector.shape)}, expected [{rows}], one value per row of "
            f"all tensors in {like[0]}; count the rows (dimension 0) over the whole list."
        )


def check_tensor(op: str, name: str, x: Tensor, dtype: torch.dtype, like: tuple[str, list[Tensor]]) -> None:
    """A tensor of this dtype on the device of the list `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}, expected a {dtype} tensor; use torch.as_tensor.")
    if x.dtype is not dtype:
        raise TypeError(f"{op}: {name} has dtype {x.dtype}, expected {dtype}; call {name}.to({dtype}).")
    like_name, tensors = like
    if tensors and x.device != tensors[0].device:
        raise ValueError(
            f"{op}: {name} is on {x.device}, expected {tensors[0].device} like {like_name}; "
            f"call {name}.to({like_name}[0].device)."
        )


def check_writable(op: str, name: str, tensors: list[Tensor]) -> None:
    """No memory that is reached twice, inside one tensor or through two tensors of the list."""
    for i, x in enumerate(tensors):
        if not x.is_contiguous() and _may_overlap(x):
            raise ValueError(
                f"{op}: {name}[{i}] has strides {x.stride()} for shape {list(x.shape)}, expected memory of "
                f"its own for every element; write into {name}[{i}].clone()."
            )
    # Traced and fake tensors have no address.
    if torch.compiler.is_compiling() or not tensors or type(tensors[0]) not in (Tensor, torch.nn.Parameter):
        return
    addresses = [x.data_ptr() for x in tensors if x.numel()]
    if len(set(addresses)) < len(addresses):
        _explain_shared(op, name, tensors)


def check_apart(op: str, lists: Lists, written: str, others: Iterable[str]) -> None:
    """The tensors that are written share no memory with those of the other lists, as far as these were passed."""
    tensors = lists.get(written)
    if not tensors or torch.compiler.is_compiling() or type(tensors[0]) not in (Tensor, torch.nn.Parameter):
        return
    addresses = {x.data_ptr(): i for i, x in enumerate(tensors) if x.numel()}
    for name in others:
        for i, x in enumerate(lists.get(name, ())):
            if x.numel() and x.data_ptr() in addresses:
                raise ValueError(
                    f"{op}: {name}[{i}] shares its memory with {written}[{addresses[x.data_ptr()]}], expected memory "
                    f"of its own, since {written} is overwritten; pass {name}[{i}].clone()."
                )


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of the words that an option knows."""
    if value not in choices:
        raise ValueError(
            f"{op}: {name} is {value!r}, expected one of {', '.join(choices)}; {nearest(str(value), choices)}"
        )


def rows_are_dense(x: Tensor) -> bool:
    """Whether each row is one block of memory, in any order inside, and the blocks follow each other."""
    if x.is_contiguous():
        return True
    columns = x.numel() // x.shape[0]
    return (x.shape[0] == 1 or x.stride(0) == columns) and _span(strides(x[0])) == columns


def make_rows_dense(lists: Lists, written: Sequence[str] = ()) -> list[tuple[Tensor, Tensor]]:
    """Replace what no kernel can read (such as transposed views) by contiguous copies.

    Returns:
        (original, copy) of what was replaced in the lists named in `written`, to copy the results back.
    """
    copied = []
    for i, x in enumerate(next(iter(lists.values()))):
        if not rows_are_dense(x):
            for name, tensors in lists.items():
                original, tensors[i] = tensors[i], tensors[i].contiguous()
                if name in written:
                    copied.append((original, tensors[i]))
    return copied


def strides(x: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions in which there is a step to make."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _span(strides: list[tuple[int, int]]) -> int | None:
    """The length of the block of memory that these dimensions fill without a gap, else None."""
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
                    f"{op}: {name}[{i}] has strides {x.stride()}, expected {expected.stride()} like "
                    f"{first_name}[{i}]; call .contiguous() on both, or give both one memory format."
                )


def _explain_kind(op: str, lists: Lists) -> NoReturn:
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if not isinstance(x, Tensor):
                advice = "leave out parameters that have no gradient" if x is None else "pass tensors only"
                raise TypeError(f"{op}: {name}[{i}] is a {type(x).__name__}, expected a tensor; {advice}.")
            if x.layout is not torch.strided:
                raise TypeError(
                    f"{op}: {name}[{i}] has layout {x.layout}, expected {torch.strided}; call {name}[{i}].to_dense()."
                )
    raise AssertionError("unreachable: the caller has seen such a tensor")


def _explain_difference(op: str, lists: Lists) -> NoReturn:
    first_name, first = next(iter(lists.items()))
    lead = first[0]
    if lead.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: {first_name}[0] has dtype {lead.dtype}, expected float32, bfloat16, float16 or float64; "
            "leave out buffers and quantised weights."
        )
    for name, tensors in lists.items():
        for i, (x, expected) in enumerate(zip(tensors, first, strict=True)):
            if x.dtype != lead.dtype:
                raise TypeError(
                    f"{op}: {name}[{i}] has dtype {x.dtype}, expected {lead.dtype} like {first_name}[0]; "
                    "convert it, or call once per dtype."
                )
            if x.device != lead.device:
                raise ValueError(
                    f"{op}: {name}[{i}] is on {x.device}, expected {lead.device} like {first_name}[0]; "
                    "move it, or call once per device."
                )
            if x.ndim == 0:
                raise ValueError(
                    f"{op}: {name}[{i}] has no dimension, expected at least one, the neurons; "
                    f"pass {name}[{i}].reshape(1) or leave it out."
                )
            if x.shape != expected.shape:
                raise ValueError(
                    f"{op}: {name}[{i}] has shape {list(x.shape)}, expected {list(expected.shape)} like "
                    f"{first_name}[{i}]; pass the lists in the same order."
                )
    raise AssertionError("unreachable: the caller has seen a difference")


def _explain_shared(op: str, name: str, tensors: list[Tensor]) -> NoReturn:
    seen: dict[int, int] = {}
    for i, x in enumerate(tensors):
        if x.numel() and (first := seen.setdefault(x.data_ptr(), i)) != i:
            raise ValueError(
                f"{op}: {name}[{i}] shares its memory with {name}[{first}], expected every parameter once; "
                "leave out the second of tied parameters."
            )
    raise AssertionError("unreachable: the caller has seen a shared address")
