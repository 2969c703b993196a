"""The definition of every op in plain PyTorch: backend `torch`, for any device and any strides.

float32, bfloat16 and float16 tensors are computed in float32, float64 tensors in float64. The tests compare every
backend with the float64 results.
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
        # Not linalg.vector_norm, which sums float32 sequentially: 9 % error for 10^7 equal numbers.
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
            f"kth_largest_change: q: expected at most {len(pool)}, the number of sub-weights of the selected neurons, "
            f"got {q}; lower q or select more neurons."
        )
    return pool.kthvalue(len(pool) - q + 1).values


def zero_changed_(
    params: Sequence[Tensor], xs: Sequence[Tensor], refs: Sequence[Tensor], neurons: Tensor, tau: Tensor
) -> Tensor:
    """Zero where the change is at least `tau`, and where both are NaN; returns how many were selected."""
    selected = torch.zeros((), dtype=torch.int64, device=neurons.device)
    for param, x, ref, mask in zip(params, xs, refs, _by_tensor(neurons, xs), strict=True):
        # In the precision of tau: a float32 tau rounded from a float64 change must still select that change.
        change = _changes(x, ref).to(tau.dtype)
        chosen = mask[:, None] & ((change >= tau) | (change.isnan() & tau.isnan()))
        param.masked_fill_(chosen.reshape(param.shape), 0)
        selected += chosen.sum()
    return selected


def scale_neurons_(params: Sequence[Tensor], scale: Tensor) -> None:
    """Multiply row r by scale[r], rounding once."""
    for param, factor in zip(params, _by_tensor(scale, params), strict=True):
        param.copy_(_wide(param) * factor.reshape(-1, *[1] * (param.ndim - 1)))


def perturb_(
    params: Sequence[Tensor],
    dirs: Sequence[Tensor],
    saved: Sequence[Tensor],
    norm: Tensor | None,
    rho: float,
    kind: str,
    scope: str,
    eps: float,
) -> Tensor:
    """Save the weights and step by rho along a direction; returns the norm that it was divided by."""

    def direction(param: Tensor, x: Tensor, weight_power: int) -> Tensor:
        if kind == "path":
            return _wide(x) - _wide(param)
        return _wide(x) * _wide(param) ** weight_power if kind == "asam" else _wide(x)

    if norm is None:
        squares = [direction(param, x, 1).square().sum() for param, x in zip(params, dirs, strict=True)]
        norm = torch.stack(squares).sqrt() if scope == "tensor" else torch.stack(squares).sum().sqrt()
    norm = norm.clone()
    moving = (norm > 0) & norm.isfinite()
    scale = torch.where(moving, rho / (norm + eps), 0).expand(len(params))
    torch._foreach_copy_([*saved], [*params])  # before any moves, so that an interruption leaves all copies or none
    for param, x, factor in zip(params, dirs, scale, strict=True):
        step = direction(param, x, 2) * factor
        # 0 * inf is NaN, and weights that do not move must keep their bits.
        param.copy_(torch.where(factor == 0, _wide(param), _wide(param) + step))
    return norm


def sharp_step_(
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    references: Sequence[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    alpha: float,
    maximize: bool,
) -> Tensor:
    """SGD from the saved weights with mixed gradients; returns the squared distance to the references, else 0."""
    squares, moved_to, buffers = [], [], []
    for i in range(len(params)):
        weight, gradient = _wide(saved[i]), _wide(grads[i])
        if first_grads:
            gradient = (1 - alpha) * _wide(first_grads[i]) + alpha * gradient
        if maximize:
            gradient = -gradient
        gradient = gradient + weight_decay * weight
        if momentum_buffers:
            buffer = momentum * _wide(momentum_buffers[i]) + (1 - dampening) * gradient
            buffers.append(buffer.to(momentum_buffers[i].dtype))
            gradient = gradient + momentum * buffer if nesterov else buffer
        moved = weight - lr * gradient
        moved_to.append(moved.to(params[i].dtype))
        if references:
            squares.append((moved - _wide(references[i])).square().sum())
    # In one call: an interruption leaves the whole step or nothing, as with the kernels.
    torch._foreach_copy_([*params, *momentum_buffers], [*moved_to, *buffers])
    return torch.stack(squares).sum() if squares else grads[0].new_zeros(())
