"""scale_neurons_: multiply every row by its own factor."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from bdfast.kernels.pieces import MIDDLE, NARROW, entry_of, first_row_of, piece_of, pointer, whole_vectors
from bdfast.kernels.signatures import ALL_DTYPES, TABLE, signatures
from bdfast.kernels.tables import DTYPES, launch, table_of


@triton.jit
def _scale(
    entry: tl.tensor,
    offset: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    factors: tl.tensor,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Scale the rows of a piece, in tiles of [ROWS, COLUMNS]."""
    param = pointer(entry, 0, offset, DTYPE, ALIGNED)
    end = whole_vectors(width, DTYPE, ALIGNED)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        factor = tl.load(factors + row, mask=row < rows, other=1.0)
        # Rows with factor 1 are skipped: masks consist mostly of ones.
        changing = tl.where(factor != 1.0, 1, 0)
        here = tl.where(tl.max(changing, 0) > 0, width, 0)
        for begin in range(0, here, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            inside = (changing > 0)[:, None] & (column < end)[None, :]
            offsets = row[:, None] * end + column[None, :]
            scaled = tl.load(param + offsets, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
            tl.store(param + offsets, scaled.to(DTYPE), mask=inside)


@triton.jit
def scale_rows(entries: tl.tensor, pieces: tl.tensor, scale: tl.tensor, DTYPE: tl.constexpr) -> None:
    """Scale the rows of one piece."""
    entry = entry_of(entries, pieces)
    row, column, rows, width, columns, aligned = piece_of(entry, DTYPE)
    offset = row * columns + column
    factors = scale + first_row_of(entry) + row
    if columns <= NARROW:
        _scale(entry, offset, rows, width, factors, DTYPE, 256, 4, False)
    elif columns <= MIDDLE:
        if aligned:
            _scale(entry, offset, rows, width, factors, DTYPE, 32, 32, True)
        else:
            _scale(entry, offset, rows, width, factors, DTYPE, 32, 32, False)
    elif aligned:
        _scale(entry, offset, rows, width, factors, DTYPE, 1, 1024, True)
    else:
        _scale(entry, offset, rows, width, factors, DTYPE, 1, 1024, False)


def scale_neurons_(params: Sequence[Tensor], scale: Tensor) -> None:
    """Multiply row r by scale[r], rounding once."""
    table = table_of([params])
    launch(scale_rows, len(table.pieces), table.entries, table.pieces, scale, DTYPE=DTYPES[params[0].dtype])


SIGNATURES = signatures(scale_rows, {**TABLE, "scale": "*fp32"}, DTYPE=ALL_DTYPES)
