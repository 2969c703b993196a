"""neuron_norms: the 1, 2 or inf norm of every row of x - ref, or of x."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bdfast.kernels.pieces import (
    MIDDLE,
    NARROW,
    add_up,
    change_bits,
    entry_of,
    first_row_of,
    parts_of,
    piece_of,
    pointer,
    whole_vectors,
)
from bdfast.kernels.signatures import TABLE, signatures
from bdfast.kernels.tables import DTYPES, launch, table_of


@triton.jit
def _measure(
    entry: tl.tensor,
    offset: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    root: tl.tensor,
    out: tl.tensor,
    ORD: tl.constexpr,
    HAS_REFS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Norms of all rows of a piece, in tiles of [ROWS, COLUMNS]."""
    x = pointer(entry, 0, offset, DTYPE, ALIGNED)
    ref = pointer(entry, 1, offset, DTYPE, ALIGNED)
    end = whole_vectors(width, DTYPE, ALIGNED)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, COLUMNS], tl.int32 if ORD == "inf" else tl.float32)
        for begin in range(0, end, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            inside = (row < rows)[:, None] & (column < end)[None, :]
            offsets = row[:, None] * end + column[None, :]
            bits = change_bits(x, ref, offsets, inside, HAS_REFS)
            if ORD == "inf":
                total = tl.maximum(total, bits)
            else:
                change = bits.to(tl.float32, bitcast=True)
                total += change if ORD == "1" else change * change
        if ORD == "inf":
            norm = tl.max(total, 1).to(tl.float32, bitcast=True)
        else:
            norm = tl.sum(total, 1)
            if ORD == "2":
                norm = tl.where(root, tl.sqrt_rn(norm), norm)
        tl.store(out + row, norm, mask=row < rows)


@triton.jit
def measure_rows(
    entries: tl.tensor,
    pieces: tl.tensor,
    norms: tl.tensor,
    cut: tl.tensor,
    ORD: tl.constexpr,
    HAS_REFS: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """The norms of the rows of a piece; for a part of a row, the partial result that `join_rows` needs."""
    entry = entry_of(entries, pieces)
    row, column, rows, width, columns, aligned = piece_of(entry, DTYPE)
    offset = row * columns + column
    whole = parts_of(entry) == 1
    out = norms + first_row_of(entry) + row
    if not whole:
        out = cut + tl.program_id(0).to(tl.int64)
    if columns <= NARROW:
        _measure(entry, offset, rows, width, whole, out, ORD, HAS_REFS, DTYPE, 512, 4, False)
    elif columns <= MIDDLE:
        if aligned:
            _measure(entry, offset, rows, width, whole, out, ORD, HAS_REFS, DTYPE, 64, 32, True)
        else:
            _measure(entry, offset, rows, width, whole, out, ORD, HAS_REFS, DTYPE, 64, 32, False)
    elif aligned:
        _measure(entry, offset, rows, width, whole, out, ORD, HAS_REFS, DTYPE, 2, 1024, True)
    else:
        _measure(entry, offset, rows, width, whole, out, ORD, HAS_REFS, DTYPE, 2, 1024, False)


@triton.jit
def join_rows(entries: tl.tensor, pieces: tl.tensor, norms: tl.tensor, cut: tl.tensor, ORD: tl.constexpr) -> None:
    """The norm of a row that was split, in the program of its first piece."""
    entry = entry_of(entries, pieces)
    row, column, _rows, _width, _columns, _aligned = piece_of(entry, tl.float32)
    parts = parts_of(entry)
    if (parts > 1) & (column == 0):
        norm = add_up(cut + tl.program_id(0), parts.to(tl.int32), ORD == "inf", 1024)
        if ORD == "2":
            norm = tl.sqrt_rn(norm)
        tl.store(norms + first_row_of(entry) + row, norm)


def neuron_norms(xs: Sequence[Tensor], refs: Sequence[Tensor], ord: float) -> Tensor:
    """[R] norms of the rows of `xs - refs`; an empty `refs` stands for zeros."""
    table = table_of([xs, refs])
    norms = torch.empty(table.rows, dtype=torch.float32, device=xs[0].device)
    count = len(table.pieces)
    cut = torch.empty(count, dtype=torch.float32, device=norms.device) if table.cut else norms
    name = "inf" if ord == math.inf else str(int(ord))
    options = {"ORD": name, "HAS_REFS": bool(refs), "DTYPE": DTYPES[xs[0].dtype]}
    launch(measure_rows, count, table.entries, table.pieces, norms, cut, **options)
    if table.cut:
        launch(join_rows, count, table.entries, table.pieces, norms, cut, ORD=name)
    return norms


_ARGUMENTS = {**TABLE, "norms": "*fp32", "cut": "*fp32"}
SIGNATURES = [
    *signatures(measure_rows, _ARGUMENTS, ORD=["1"], HAS_REFS=[True], DTYPE=DTYPES.values()),
    *signatures(measure_rows, _ARGUMENTS, ORD=["2"], HAS_REFS=[False], DTYPE=[tl.float32]),
    *signatures(measure_rows, _ARGUMENTS, ORD=["inf"], HAS_REFS=[True], DTYPE=[tl.float32]),
    *signatures(join_rows, _ARGUMENTS, ORD=["1", "2", "inf"]),
]
