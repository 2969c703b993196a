"""Helpers that prepare lists for the ops: one dtype and device per list, equal strides at each index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from bdfast.ops import checks
from bdfast.ops.checks import strides

Item = TypeVar("Item")
Key = tuple[Any, ...]


def grouped(items: Iterable[tuple[Key, Item]]) -> dict[Key, list[Item]]:
    """The items by key, in the order in which the keys come."""
    groups: dict[Key, list[Item]] = {}
    for key, item in items:
        groups.setdefault(key, []).append(item)
    return groups


def kind(x: Tensor) -> Key:
    """Dtype and device, which must be the same for all tensors of one call."""
    return x.dtype, x.device


def with_rows(x: Tensor) -> Tensor:
    """The tensor; a tensor without dimensions (such as a learnt temperature) as a view with one row."""
    return x.view(1) if x.ndim == 0 else x


def rows(xs: Sequence[Tensor]) -> list[Tensor]:
    """`with_rows` for a list."""
    return [x.view(1) if x.ndim == 0 else x for x in xs]


def laid_out_like(x: Tensor, like: Tensor, what: str = "gradient") -> Tensor:
    """`x`, or a copy with the strides, dtype and device of `like` if it has others; `what` names it in the error."""
    if x.layout is not torch.strided:
        x = x.to_dense()
    # Other shapes with equal strides are left to the ops, which compare all shapes faster.
    if (
        x.dtype == like.dtype
        and x.device == like.device
        and (x.stride() == like.stride() or strides(x) == strides(like))
    ):
        return x
    if x.shape != like.shape:
        raise ValueError(
            f"{what}: expected the shape of its parameter, {list(like.shape)}, got {list(x.shape)}; make it anew for a "
            "parameter that has changed its shape."
        )
    return torch.empty_like(like).copy_(x)


def lay_out(xs: Iterable[Tensor | None], likes: Sequence[Tensor], what: str = "gradient") -> list[Tensor]:
    """`laid_out_like` for a list; zeros for what is missing."""
    strided = torch.strided
    return [
        torch.zeros_like(like)
        if x is None
        else x
        if x.layout is strided and x.dtype is like.dtype and x.stride() == like.stride() and x.device == like.device
        else laid_out_like(x, like, what)
        for x, like in zip(xs, likes, strict=True)
    ]


def places_of(params: Sequence[Tensor]) -> object:
    """The addresses, strides, shapes, dtypes and devices of parameters, to compare with those of another time."""
    try:
        memory = [x.data_ptr() for x in params], [x.stride() for x in params], [x.shape for x in params]
        return *memory, [x.dtype for x in params], [x.device for x in params]
    except RuntimeError:  # a sparse one has no address
        return object()  # unequal to that of any other time


def workable(params: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The parameters as the ops take them: detached, with rows that are blocks of memory.

    Returns:
        One tensor for each parameter, and (parameter, tensor) of those that had to be copied, to `write` back: views
        such as every second column, and sparse ones.
    """
    works, copied = [], []
    for param in params:
        x = param.detach()
        if x.layout is not torch.strided or not (x.is_contiguous() or checks.rows_are_dense(x)):
            x = x.to_dense().contiguous()
            copied.append((param, x))
        works.append(x)
    return works, copied


def write(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write dense tensors into parameters of any layout; all strided ones in one call, which no error can divide."""
    strided = [pair for pair in pairs if pair[0].layout is torch.strided]
    if not torch.compiler.is_compiling():  # the compiler cannot trace `is_neg`
        # `_foreach_copy_` refuses to write to negated views, so it gets their memory without the negation.
        strided = [(torch._neg_view(x), -y) if x.is_neg() else (x, y) for x, y in strided]
    if strided:
        torch._foreach_copy_([param for param, _ in strided], [x for _, x in strided])
    for param, x in pairs:
        if param.layout is not torch.strided:
            # Entries that become zero are kept: only the entries of a sparse parameter get a gradient.
            there = param.detach().coalesce()
            zeros = torch.sparse_coo_tensor(there.indices(), torch.zeros_like(there.values()), there.shape)
            param.copy_((zeros + x.to(param.dtype).to_sparse(there.sparse_dim())).coalesce())


def euclidean(norms: Sequence[Tensor]) -> Tensor:
    """The norm of the concatenation of tensors with these norms, on the device of the first."""
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def norms(tensors: list[Tensor]) -> list[Tensor]:
    """The norm of each of these tensors of one kind, in float32 at least."""
    return list(torch._foreach_norm(tensors, 2, dtype=torch.promote_types(tensors[0].dtype, torch.float32)))


def norm_along(mode: str, params: list[Tensor], dirs: list[Tensor]) -> Tensor:
    """[] float32: what `perturb_` divides by, for a part of the parameters."""
    if mode == "path":
        dirs = list(torch._foreach_sub(dirs, params))
    elif mode == "asam":
        dirs = list(torch._foreach_mul(dirs, params))
    return euclidean(norms(dirs)).float()


def owned(gradient: Tensor) -> Tensor:
    """A gradient that the next backward pass does not overwrite: DDP may keep all gradients in one buffer."""
    gradient = gradient.detach()  # with create_graph=True it would hold the graph
    if gradient.layout is not torch.strided:
        return gradient
    shared = gradient.untyped_storage().nbytes() > gradient.numel() * gradient.element_size()
    return gradient.clone() if shared else gradient


def name_of(groups: Sequence[dict[str, Any]], params: Sequence[Tensor], chosen: int) -> str:
    """The name of a parameter; its position in the param groups if the optimizer was not given names."""
    places = ((i, j) for i, group in enumerate(groups) for j, x in enumerate(group["params"]) if x is params[chosen])
    i, j = next(places)
    return str(groups[i]["param_names"][j] if "param_names" in groups[i] else f"param_groups[{i}]['params'][{j}]")
