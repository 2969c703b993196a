"""perturb_: compute the norm of the direction, save the weights, and move them by rho along the direction."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.kernels.pieces import entry_of, piece_of, pointer, whole_vectors
from bdfast.kernels.signatures import ALL_DTYPES, TABLE, signatures
from bdfast.kernels.sums import combine
from bdfast.kernels.tables import DTYPES, launch, table_of

_BLOCK = tl.constexpr(2048)
_LANES = tl.constexpr(128)


@triton.jit
def _normed(param: tl.tensor, x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """The quantity whose norm is computed."""
    if KIND == "path":
        direction = x - param
    elif KIND == "asam":
        direction = x * param
    else:
        direction = x
    return direction


@triton.jit
def _squares(
    entry: tl.tensor,
    offset: tl.tensor,
    width: tl.tensor,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    params = pointer(entry, 0, offset, DTYPE, ALIGNED)
    dirs = pointer(entry, 1, offset, DTYPE, ALIGNED)
    end = whole_vectors(width, DTYPE, ALIGNED)
    total = tl.zeros([_BLOCK], tl.float32)
    for begin in range(0, end, _BLOCK):
        at = begin + tl.arange(0, _BLOCK)
        direction = tl.load(dirs + at, mask=at < end, other=0.0).to(tl.float32)
        if KIND != "sam":
            param = tl.load(params + at, mask=at < end, other=0.0).to(tl.float32)
            direction = _normed(param, direction, KIND)
        total += direction * direction
    return tl.sum(total, 0)


@triton.jit
def measure_directions(
    entries: tl.tensor, pieces: tl.tensor, squares: tl.tensor, KIND: tl.constexpr, DTYPE: tl.constexpr
) -> None:
    """The sum of the squares of one piece of the directions."""
    entry = entry_of(entries, pieces)
    _row, offset, _rows, width, _columns, aligned = piece_of(entry, DTYPE)
    if aligned:
        total = _squares(entry, offset, width, KIND, DTYPE, True)
    else:
        total = _squares(entry, offset, width, KIND, DTYPE, False)
    tl.store(squares + tl.program_id(0), total)


@triton.jit
def _step(
    entry: tl.tensor,
    offset: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    params = pointer(entry, 0, offset, DTYPE, ALIGNED)
    dirs = pointer(entry, 1, offset, DTYPE, ALIGNED)
    saved = pointer(entry, 2, offset, DTYPE, ALIGNED)
    end = whole_vectors(width, DTYPE, ALIGNED)
    # Not a step of length 0: if the norm is not finite, neither is some direction, and 0 times it is NaN.
    moving_end = tl.where(factor != 0, end, 0)
    for begin in range(0, end, _BLOCK):
        at = begin + tl.arange(0, _BLOCK)
        before = tl.load(params + at, mask=at < end, other=0.0)
        tl.store(saved + at, before, mask=at < end)
        x = tl.load(dirs + at, mask=at < moving_end, other=0.0).to(tl.float32)
        param = before.to(tl.float32)
        direction = _normed(param, x, KIND)
        if KIND == "asam":
            direction = direction * param
        tl.store(params + at, (param + direction * factor).to(DTYPE), mask=at < moving_end)


@triton.jit(do_not_specialize=["copied"])
def step_along(
    entries: tl.tensor,
    pieces: tl.tensor,
    norms: tl.tensor,
    result: tl.tensor,
    copied: tl.tensor,
    rho: tl.tensor,
    eps: tl.tensor,
    PER_TENSOR: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """Save and move one piece; the first program also copies the norms that were given, `copied` of them."""
    if tl.program_id(0) == 0:
        lane = tl.arange(0, _LANES)
        for begin in range(0, copied, _LANES):
            given = tl.load(norms + begin + lane, mask=begin + lane < copied)
            tl.store(result + begin + lane, given, mask=begin + lane < copied)
    norm = tl.load(norms + tl.load(pieces + tl.program_id(0))) if PER_TENSOR else tl.load(norms)
    # NaN fails the first comparison.
    moving = (norm > 0) & (norm < float("inf"))
    factor = tl.where(moving, tl.div_rn(tl.cast(rho, tl.float32), norm + tl.cast(eps, tl.float32)), 0.0)
    entry = entry_of(entries, pieces)
    _row, offset, _rows, width, _columns, aligned = piece_of(entry, DTYPE)
    if aligned:
        _step(entry, offset, width, factor, KIND, DTYPE, True)
    else:
        _step(entry, offset, width, factor, KIND, DTYPE, False)


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
    table = table_of([params, dirs, saved], flat=True)
    lists, count = (table.entries, table.pieces), len(table.pieces)
    dtype, per_tensor = DTYPES[params[0].dtype], scope == "tensor"
    if norm is not None and count == 0:
        return norm.clone()
    shape = (len(params),) if per_tensor else ()
    result = torch.empty(shape, dtype=torch.float32, device=params[0].device)
    if norm is None:
        squares = torch.empty(count, dtype=torch.float32, device=result.device)
        launch(measure_directions, count, *lists, squares, KIND=kind, DTYPE=dtype)
        combine(table, squares, result, per_tensor=per_tensor, root=True)
    norms, copied = (result, 0) if norm is None else (norm, result.numel())
    options = {"PER_TENSOR": per_tensor, "KIND": kind, "DTYPE": dtype}
    launch(step_along, count, *lists, norms, result, copied, float(rho), float(eps), **options)
    return result


_ARGUMENTS = {**TABLE, "norms": "*fp32", "result": "*fp32", "copied": "i32", "rho": "fp32", "eps": "fp32"}
SIGNATURES = [
    *signatures(measure_directions, {**TABLE, "squares": "*fp32"}, KIND=["asam"], DTYPE=ALL_DTYPES),
    *signatures(measure_directions, {**TABLE, "squares": "*fp32"}, KIND=["sam", "path"], DTYPE=[tl.float32]),
    *signatures(step_along, _ARGUMENTS, PER_TENSOR=[False], KIND=["asam"], DTYPE=ALL_DTYPES),
    *signatures(step_along, _ARGUMENTS, PER_TENSOR=[True], KIND=["sam", "path"], DTYPE=[tl.float32]),
]
