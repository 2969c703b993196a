"""Helpers that prepare lists for the ops: one dtype and device per list, equal strides at each index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

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


def laid_out_like(x: Tensor, like: Tensor) -> Tensor:
    """`x`, or a copy with the strides and dtype of `like` if those of `x` differ."""
    if x.layout is not torch.strided:
        x = x.to_dense()
    if x.dtype == like.dtype and (x.stride() == like.stride() or strides(x) == strides(like)):
        return x
    return torch.empty_like(like).copy_(x)


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
    shared = gradient.untyped_storage().nbytes() > gradient.numel() * gradient.element_size()
    return gradient.clone() if shared else gradient


def or_zeros(x: Tensor | None, param: Tensor) -> Tensor:
    """`x` with the strides and dtype of the parameter; zeros if `x` is None."""
    return torch.zeros_like(param.detach()) if x is None else laid_out_like(x, param)


def name_of(groups: Sequence[dict[str, Any]], params: Sequence[Tensor], chosen: int) -> str:
    """The name of a parameter; its position in the param groups if the optimizer was not given names."""
    places = ((i, j) for i, group in enumerate(groups) for j, x in enumerate(group["params"]) if x is params[chosen])
    i, j = next(places)
    return str(groups[i]["param_names"][j] if "param_names" in groups[i] else f"param_groups[{i}]['params'][{j}]")
