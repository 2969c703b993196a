"""The meaning of every op in plain PyTorch: backend `torch`, for any device and any strides.

float32, bfloat16 and float16 tensors are computed in float32, float64 tensors in float64; the latter is the
truth that the tests measure every backend against.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _changes(x: Tensor, ref: Tensor | None) -> Tensor:
    """The absolute change of every sub-weight, [rows, C]."""
    change = (_wide(x) if ref is None else _wide(x) - _wide(ref)).abs()
    return change.flatten(1) if change.ndim > 1 else change[:, None]


def _by_tensor(flat: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One piece per tensor of a [R] vector."""
    return flat.split([x.shape[0] for x in tensors])


def neuron_norms(xs: Sequence[Tensor], refs: Sequence[Tensor], ord: float) -> Tensor:
    """[R] norms of the rows of `xs - refs`; an empty `refs` stands for zeros."""
    norms = []
    for i, x in enumerate(xs):
        rows = _changes(x, refs[i] if refs else None)
        # Not linalg.vector_norm, which adds float32 up in one go: 9 % off for 10^7 equal numbers.
        if ord == 1:
            norms.append(rows.sum(1))
        elif ord == 2:
            norms.append(rows.square().sum(1).sqrt())
        else:
            norms.append(rows.amax(1) if rows.shape[1] else rows.new_zeros(len(rows)))
    return torch.cat(norms)


def kth_largest_change(xs: Sequence[Tensor], refs: Sequence[Tensor], neurons: Tensor, q: int) -> Tensor:
    """The q-th largest change in the rows that `neurons` selects; NaN counts as the largest."""
    masks = _by_tensor(neurons, xs)
    pool = torch.cat([_changes(x, ref)[mask].flatten() for x, ref, mask in zip(xs, refs, masks, strict=True)])
    if q > len(pool):
        raise ValueError(
            f"kth_largest_change: q is {q}, expected at most {len(pool)}, the number of sub-weights of the "
            "selected neurons; lower q or select more neurons."
        )
    return pool.kthvalue(len(pool) - q + 1).values


def zero_changed_(
    params: Sequence[Tensor], xs: Sequence[Tensor], refs: Sequence[Tensor], neurons: Tensor, tau: Tensor
) -> Tensor:
    """Zero where the change is at least `tau`, and where both are NaN; returns how many were selected."""
    selected = torch.zeros((), dtype=torch.int64, device=neurons.device)
    for param, x, ref, mask in zip(params, xs, refs, _by_tensor(neurons, xs), strict=True):
        # In the precision of tau: a float32 tau rounded from a float64 change must still find that change.
        change = _changes(x, ref).to(tau.dtype)
        chosen = mask[:, None] & ((change >= tau) | (change.isnan() & tau.isnan()))
        param.masked_fill_(chosen.reshape(param.shape), 0)
        selected += chosen.sum()
    return selected


def scale_neurons_(params: Sequence[Tensor], scale: Tensor) -> None:
    """Multiply row r by scale[r], rounding once."""
    for param, factor in zip(params, _by_tensor(scale, params), strict=True):
        param.copy_(_wide(param) * factor.reshape(-1, *[1] * (param.ndim - 1)))
