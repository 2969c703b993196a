"""zero_changed_: zero the sub-weights of selected rows whose change is at least tau, and count them."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.kernels.pieces import (
    MIDDLE,
    NARROW,
    change_bits,
    entry_of,
    first_row_of,
    piece_of,
    pointer,
    whole_vectors,
)
from bdfast.kernels.signatures import ALL_DTYPES, TABLE, signatures
from bdfast.kernels.tables import DTYPES, launch, table_of


@triton.jit
def _zero(
    entry: tl.tensor,
    offset: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    neurons: tl.tensor,
    tau: tl.tensor,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Zero the chosen elements of the selected rows of a piece, in tiles of [ROWS, COLUMNS]; return their number."""
    param = pointer(entry, 0, offset, DTYPE, ALIGNED)
    x = pointer(entry, 1, offset, DTYPE, ALIGNED)
    ref = pointer(entry, 2, offset, DTYPE, ALIGNED)
    end = whole_vectors(width, DTYPE, ALIGNED)
    count = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        selected = tl.load(neurons + row, mask=row < rows, other=0).to(tl.int32)
        # Rows that are not selected are not read.
        here = tl.where(tl.max(selected, 0) > 0, width, 0)
        for begin in range(0, here, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            inside = (selected > 0)[:, None] & (column < end)[None, :]
            offsets = row[:, None] * end + column[None, :]
            change = change_bits(x, ref, offsets, inside, True).to(tl.float32, bitcast=True)
            # A NaN tau selects exactly the NaN changes.
            chosen = tl.where(tau == tau, tl.where(change >= tau, 1, 0), tl.where(change != change, 1, 0))
            chosen = tl.where(inside, chosen, 0)
            count += chosen
            # Whole vectors are written; kept elements keep their bits.
            kept = tl.load(param + offsets, mask=inside, other=0.0)
            tl.store(param + offsets, tl.where(chosen > 0, tl.zeros_like(kept), kept), mask=inside)
    return tl.sum(tl.sum(count, 1), 0)


@triton.jit
def zero_rows(
    entries: tl.tensor,
    pieces: tl.tensor,
    neurons: tl.tensor,
    threshold: tl.tensor,
    result: tl.tensor,
    DTYPE: tl.constexpr,
) -> None:
    """Zero in one piece and add to the count."""
    entry = entry_of(entries, pieces)
    row, column, rows, width, columns, aligned = piece_of(entry, DTYPE)
    offset = row * columns + column
    mask = neurons + first_row_of(entry) + row
    tau = tl.load(threshold)
    if columns <= NARROW:
        count = _zero(entry, offset, rows, width, mask, tau, DTYPE, 256, 4, False)
    elif columns <= MIDDLE:
        if aligned:
            count = _zero(entry, offset, rows, width, mask, tau, DTYPE, 32, 32, True)
        else:
            count = _zero(entry, offset, rows, width, mask, tau, DTYPE, 32, 32, False)
    elif aligned:
        count = _zero(entry, offset, rows, width, mask, tau, DTYPE, 1, 1024, True)
    else:
        count = _zero(entry, offset, rows, width, mask, tau, DTYPE, 1, 1024, False)
    tl.atomic_add(result, count.to(tl.int64), mask=count > 0, sem="relaxed")


def zero_changed_(
    params: Sequence[Tensor], xs: Sequence[Tensor], refs: Sequence[Tensor], neurons: Tensor, tau: Tensor
) -> Tensor:
    """Zero where the change is at least `tau`, and where both are NaN; returns how many were selected."""
    table = table_of([params, xs, refs])
    result = torch.zeros((), dtype=torch.int64, device=neurons.device)
    lists = table.entries, table.pieces
    mask = neurons.view(torch.uint8)
    launch(zero_rows, len(table.pieces), *lists, mask, tau, result, DTYPE=DTYPES[params[0].dtype])
    return result


SIGNATURES = signatures(
    zero_rows, {**TABLE, "neurons": "*u8", "threshold": "*fp32", "result": "*i64"}, DTYPE=ALL_DTYPES
)
