"""Warnings about results that are correct but probably not what was wanted. Each is given once per process."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# How many elements of each tensor are compared after a step: reading all of them would be a pass over memory.
_SAMPLE = 4096

_given: set[str] = set()
_seen: set[tuple[str, torch.dtype]] = set()


def _warn(key: str, message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)  # at the call of the op
    _given.add(key)  # only now: a filter may have turned the warning into an error


def warn_without_gradient(op: str, lists: Mapping[str, Sequence[Tensor] | None]) -> None:
    """Warn if autograd would be expected to record this call. Must be called directly by the op."""
    if op in _given or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    if not torch._C._any_requires_grad(*lists.values()):  # half the time of a loop in Python
        return
    tensors = ((f"{name}[{i}]", x) for name, xs in lists.items() for i, x in enumerate(xs or ()))
    first = next(name for name, x in tensors if getattr(x, "requires_grad", False))
    _warn(
        op,
        f"{op}: {first}: expected a tensor that requires no gradient, got requires_grad=True; the result has none. "
        f"Pass {first}.detach(), or call {op} under torch.no_grad().",
    )


def warn_of_lost_step(
    op: str,
    params: Sequence[Tensor],
    dirs: Sequence[Tensor],
    saved: Sequence[Tensor],
    norm: Tensor,
    *,
    rho: float,
    mode: str,
) -> None:
    """Warn if rounding to a 16-bit dtype has undone a whole step. Must be called directly by the op, after the step.

    Compares a sample of each tensor. On devices other than the CPU it checks only the first step in each dtype, because
    the host has to wait for the device.
    """
    if not params or params[0].dtype not in (torch.bfloat16, torch.float16) or rho == 0 or "lost step" in _given:
        return
    if torch.compiler.is_compiling() or type(params[0]) not in (Tensor, torch.nn.Parameter) or params[0].is_meta:
        return
    kind = params[0].device.type, params[0].dtype
    if kind[0] != "cpu":
        if kind in _seen or (kind[0] == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        _seen.add(kind)
    if _is_lost(params, dirs, saved, norm, mode):
        _warn(
            "lost step",
            f"{op}: rho: expected a step that weights in {params[0].dtype} can take, got {rho:g}, which has moved none "
            f"of the first {_SAMPLE} weights of any tensor; raise rho, or keep the weights in float32.",
        )


def _is_lost(
    params: Sequence[Tensor], dirs: Sequence[Tensor], saved: Sequence[Tensor], norm: Tensor, mode: str
) -> bool:
    """Whether no sampled weight has changed although some have a nonzero direction."""
    for param, keep in zip(params, saved, strict=True):
        if not torch.equal(_sample(param), _sample(keep)):
            return False
    with torch.no_grad():
        return _has_direction(dirs, saved, norm, mode)


def _has_direction(dirs: Sequence[Tensor], saved: Sequence[Tensor], norm: Tensor, mode: str) -> bool:
    """Whether a sampled weight of a tensor that moves has a nonzero direction."""
    moving = ((norm > 0) & norm.isfinite()).expand(len(dirs)).tolist()
    for i in (i for i, moves in enumerate(moving) if moves):
        direction, weight = _sample(dirs[i]).float(), _sample(saved[i]).float()
        if mode == "path":
            direction = direction - weight
        elif mode == "asam":
            direction = direction * weight.square()
        if direction.any():
            return True
    return False


def _sample(x: Tensor) -> Tensor:
    """The tensor, or the first elements in memory order if it is large; its rows are dense."""
    return x if x.numel() <= _SAMPLE else x.as_strided((_SAMPLE,), (1,))
