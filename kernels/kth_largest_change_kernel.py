"""kth_largest_change: exact selection, digit by digit, from histograms of the bits of the changes.

Three passes over the lists find digits of 11, 10 and 10 bits; nothing is copied or sorted.
"""

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

# Of the 31 bits without the sign, the first digit has 11 and the others have 10.
_BITS = tl.constexpr(10)
_BINS = tl.constexpr(2048)
_DIGITS = tl.constexpr(3)


@triton.jit
def _count(
    entry: tl.tensor,
    offset: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    neurons: tl.tensor,
    found: tl.tensor,
    shift: tl.tensor,
    limit: tl.tensor,
    histogram: tl.tensor,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Count the next digit, below `limit`, of the keys in the selected rows of a piece that have the digits found."""
    x = pointer(entry, 0, offset, DTYPE, ALIGNED)
    ref = pointer(entry, 1, offset, DTYPE, ALIGNED)
    end = whole_vectors(width, DTYPE, ALIGNED)
    counts = tl.zeros([_BINS], tl.int32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        selected = tl.load(neurons + row, mask=row < rows, other=0).to(tl.int32)
        # Rows that are not selected are not read.
        here = tl.where(tl.max(selected, 0) > 0, width, 0)
        for begin in range(0, here, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            inside = (selected > 0)[:, None] & (column < end)[None, :]
            offsets = row[:, None] * end + column[None, :]
            key = change_bits(x, ref, offsets, inside, True)
            # Keys with other leading digits differ by `limit` or more.
            digit = (key >> shift) - (found << _BITS)
            counted = inside & (digit >= 0) & (digit < limit)
            counts += tl.histogram(tl.ravel(digit), _BINS, mask=tl.ravel(counted))
    bins = tl.arange(0, _BINS)
    tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _descend(histograms: tl.tensor, passes: tl.tensor, q: tl.tensor) -> tl.tensor:
    """The digits found by the passes so far, as the leading bits of a key; -1 if there are fewer than q keys."""
    bins = tl.arange(0, _BINS)
    rank = tl.cast(q, tl.int64)
    found = tl.cast(0, tl.int32)
    for digit in range(0, passes):
        counts = tl.load(histograms + digit * _BINS + bins)
        reached = tl.cumsum(counts, 0, reverse=True) >= rank
        bin = tl.sum(reached.to(tl.int32), 0) - 1
        rank -= tl.sum(tl.where(bins > bin, counts, 0), 0)
        # If no bin is reached, all bits are set here and stay set: no key has these leading digits.
        found = (found << _BITS) | bin
    return found


@triton.jit(do_not_specialize=["digit", "q"])
def count_digits(
    entries: tl.tensor,
    pieces: tl.tensor,
    neurons: tl.tensor,
    histograms: tl.tensor,
    digit: tl.tensor,
    q: tl.tensor,
    DTYPE: tl.constexpr,
) -> None:
    """Add one piece to the histogram of this digit."""
    entry = entry_of(entries, pieces)
    row, column, rows, width, columns, aligned = piece_of(entry, DTYPE)
    offset = row * columns + column
    mask = neurons + first_row_of(entry) + row
    found = _descend(histograms, digit, q)
    shift = (_DIGITS - 1 - digit) * _BITS
    limit = tl.where(digit == 0, _BINS, _BINS // 2)
    bins = histograms + digit * _BINS
    if columns <= NARROW:
        _count(entry, offset, rows, width, mask, found, shift, limit, bins, DTYPE, 512, 4, False)
    elif columns <= MIDDLE:
        if aligned:
            _count(entry, offset, rows, width, mask, found, shift, limit, bins, DTYPE, 64, 32, True)
        else:
            _count(entry, offset, rows, width, mask, found, shift, limit, bins, DTYPE, 64, 32, False)
    elif aligned:
        _count(entry, offset, rows, width, mask, found, shift, limit, bins, DTYPE, 2, 1024, True)
    else:
        _count(entry, offset, rows, width, mask, found, shift, limit, bins, DTYPE, 2, 1024, False)


@triton.jit(do_not_specialize=["passes", "q"])
def finish(histograms: tl.tensor, result: tl.tensor, passes: tl.tensor, q: tl.tensor) -> None:
    """The key made of all digits, as a number; -1 has the bits of a NaN."""
    tl.store(result, _descend(histograms, passes, q).to(tl.float32, bitcast=True))


def kth_largest_change(xs: Sequence[Tensor], refs: Sequence[Tensor], neurons: Tensor, q: int) -> Tensor:
    """The q-th largest change in the rows that `neurons` selects; NaN counts as the largest.

    Where the rows have fewer than q sub-weights the result is NaN: to raise an error the host would have to wait.
    """
    table = table_of([xs, refs])
    histograms = torch.zeros(_DIGITS.value, _BINS.value, dtype=torch.int64, device=neurons.device)
    result = torch.empty((), dtype=torch.float32, device=neurons.device)
    lists = table.entries, table.pieces
    mask = neurons.view(torch.uint8)
    for digit in range(_DIGITS.value):
        launch(count_digits, len(table.pieces), *lists, mask, histograms, digit, q, DTYPE=DTYPES[xs[0].dtype])
    launch(finish, 1, histograms, result, _DIGITS.value, q)
    return result


_NUMBERS = {"digit": "i32", "q": "i64"}
SIGNATURES = [
    *signatures(count_digits, {**TABLE, "neurons": "*u8", "histograms": "*i64", **_NUMBERS}, DTYPE=ALL_DTYPES),
    *signatures(finish, {"histograms": "*i64", "result": "*fp32", "passes": "i32", "q": "i64"}),
]
