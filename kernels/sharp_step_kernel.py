"""sharp_step_: SGD from the saved weights with a mix of two gradients; also the distance to a reference."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.kernels.pieces import entry_of, piece_of, pointer, whole_vectors
from bdfast.kernels.signatures import ALL_DTYPES, TABLE, signatures
from bdfast.kernels.sums import combine
from bdfast.kernels.tables import DTYPES, launch, table_of

# Up to five lists are read at once: more would not fit into the registers.
_BLOCK = tl.constexpr(1024)


@triton.jit
def _step(
    entry: tl.tensor,
    offset: tl.tensor,
    width: tl.tensor,
    lr: tl.tensor,
    momentum: tl.tensor,
    undamped: tl.tensor,
    weight_decay: tl.tensor,
    alpha: tl.tensor,
    first_share: tl.tensor,
    sign: tl.tensor,
    MOMENTUM: tl.constexpr,
    FIRST: tl.constexpr,
    DISTANCE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Step one piece; returns its squared distance to the references, else 0."""
    params = pointer(entry, 0, offset, DTYPE, ALIGNED)
    saved = pointer(entry, 1, offset, DTYPE, ALIGNED)
    grads = pointer(entry, 2, offset, DTYPE, ALIGNED)
    buffers = pointer(entry, 3, offset, DTYPE, ALIGNED)
    first_grads = pointer(entry, 4, offset, DTYPE, ALIGNED)
    references = pointer(entry, 5, offset, DTYPE, ALIGNED)
    end = whole_vectors(width, DTYPE, ALIGNED)
    total = tl.zeros([_BLOCK], tl.float32)
    for begin in range(0, end, _BLOCK):
        at = begin + tl.arange(0, _BLOCK)
        inside = at < end
        weight = tl.load(saved + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(grads + at, mask=inside, other=0.0).to(tl.float32)
        if FIRST:
            first = tl.load(first_grads + at, mask=inside, other=0.0).to(tl.float32)
            gradient = first_share * first + alpha * gradient
        gradient = sign * gradient + weight_decay * weight
        if MOMENTUM != "none":
            buffer = tl.load(buffers + at, mask=inside, other=0.0).to(tl.float32)
            buffer = momentum * buffer + undamped * gradient
            tl.store(buffers + at, buffer.to(DTYPE), mask=inside)
            gradient = gradient + momentum * buffer if MOMENTUM == "nesterov" else buffer
        moved = weight - lr * gradient
        tl.store(params + at, moved.to(DTYPE), mask=inside)
        if DISTANCE:
            away = moved - tl.load(references + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(inside, away * away, 0.0)
    return tl.sum(total, 0)


@triton.jit
def step_pieces(
    entries: tl.tensor,
    pieces: tl.tensor,
    squares: tl.tensor,
    lr: tl.tensor,
    momentum: tl.tensor,
    undamped: tl.tensor,
    weight_decay: tl.tensor,
    alpha: tl.tensor,
    first_share: tl.tensor,
    sign: tl.tensor,
    MOMENTUM: tl.constexpr,
    FIRST: tl.constexpr,
    DISTANCE: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """Step one piece; its squared distance goes to `squares`, which holds one zero where there are no references."""
    entry = entry_of(entries, pieces)
    _row, offset, _rows, width, _columns, aligned = piece_of(entry, DTYPE)
    # Written twice, because Triton cannot forward a list of arguments.
    if aligned:
        total = _step(
            entry, offset, width, lr, momentum, undamped, weight_decay, alpha, first_share, sign,
            MOMENTUM, FIRST, DISTANCE, DTYPE, True,
        )  # fmt: skip
    else:
        total = _step(
            entry, offset, width, lr, momentum, undamped, weight_decay, alpha, first_share, sign,
            MOMENTUM, FIRST, DISTANCE, DTYPE, False,
        )  # fmt: skip
    if DISTANCE:
        tl.store(squares + tl.program_id(0), total)
    elif tl.program_id(0) == 0:
        tl.store(squares, total)


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
    table = table_of([params, saved, grads, momentum_buffers, first_grads, references], flat=True)
    count, device = len(table.pieces), params[0].device
    if count == 0:
        return torch.zeros((), dtype=torch.float32, device=device)
    result = torch.empty((), dtype=torch.float32, device=device)
    squares = torch.empty(count, dtype=torch.float32, device=device) if references else result
    kind = "none" if not momentum_buffers else "nesterov" if nesterov else "plain"
    numbers = lr, momentum, 1 - dampening, weight_decay, alpha, 1 - alpha, -1.0 if maximize else 1.0
    options = {"FIRST": bool(first_grads), "DISTANCE": bool(references), "DTYPE": DTYPES[params[0].dtype]}
    # Always as float: Triton would compile another specialisation for an int.
    launch(step_pieces, count, table.entries, table.pieces, squares, *map(float, numbers), MOMENTUM=kind, **options)
    if references:
        combine(table, squares, result, per_tensor=False, root=False)
    return result


_NUMBERS = ("lr", "momentum", "undamped", "weight_decay", "alpha", "first_share", "sign")
_ARGUMENTS = {**TABLE, "squares": "*fp32", **dict.fromkeys(_NUMBERS, "fp32")}
SIGNATURES = [
    *signatures(step_pieces, _ARGUMENTS, MOMENTUM=["plain"], FIRST=[True], DISTANCE=[True], DTYPE=ALL_DTYPES),
    *signatures(step_pieces, _ARGUMENTS, MOMENTUM=["none"], FIRST=[False], DISTANCE=[False], DTYPE=[tl.float32]),
    *signatures(step_pieces, _ARGUMENTS, MOMENTUM=["nesterov"], FIRST=[False], DISTANCE=[True], DTYPE=[tl.float32]),
]
