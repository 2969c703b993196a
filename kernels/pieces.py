"""Device code that reads a table: the piece of a program, and pointers that allow wide loads.

A program takes the aligned branch if all addresses and row lengths are multiples of 16 bytes, which is the usual case.
Alignment hints are given to values that are computed inside a branch: `tl.multiple_of` marks the operation that made
its argument, so a value from outside would be marked for both branches.
"""

import triton
import triton.language as tl

from bdfast.kernels import tables

_ENTRY = tl.constexpr(tables.ENTRY)
_PIECE = tl.constexpr(tables.PIECE)
_ADDRESSES = tl.constexpr(len(tables.FIELDS))
_COLUMNS = tl.constexpr(tables.FIELDS.index("columns"))
_ROWS = tl.constexpr(tables.FIELDS.index("rows"))
_FIRST_ROW = tl.constexpr(tables.FIELDS.index("first_row"))
_FIRST_PIECE = tl.constexpr(tables.FIELDS.index("first_piece"))
_PIECES = tl.constexpr(tables.FIELDS.index("pieces"))
_PARTS = tl.constexpr(tables.FIELDS.index("parts"))
_ROWS_PER_PIECE = tl.constexpr(tables.FIELDS.index("rows_per_piece"))
_ALIGNED = tl.constexpr(tables.FIELDS.index("aligned"))

NARROW = tl.constexpr(tables.NARROW)
MIDDLE = tl.constexpr(tables.MIDDLE)


@triton.jit
def entry_of(entries: tl.tensor, pieces: tl.tensor) -> tl.tensor:
    """The entry that this program's piece belongs to."""
    return entries + tl.load(pieces + tl.program_id(0)) * _ENTRY


@triton.jit
def piece_of(entry: tl.tensor, DTYPE: tl.constexpr) -> tuple[tl.tensor, ...]:
    """This program's piece.

    Its first row, its first column (in a row that is cut), how many rows and how many columns it has, how many columns
    the rows have in memory, and whether all of it may be loaded wide. Several rows are always whole, so that offsets
    from the start of a piece are rows times its own columns, and small.
    """
    columns = tl.load(entry + _COLUMNS)
    parts = tl.load(entry + _PARTS)
    rows_per_piece = tl.load(entry + _ROWS_PER_PIECE)
    index = tl.program_id(0) - tl.load(entry + _FIRST_PIECE)
    row = index // parts * rows_per_piece
    column = index % parts * _PIECE
    rows = tl.minimum(tl.load(entry + _ROWS) - row, rows_per_piece).to(tl.int32)
    width = tl.minimum(columns - column, _PIECE).to(tl.int32)
    aligned = (tl.load(entry + _ALIGNED) != 0) & (width % (128 // DTYPE.primitive_bitwidth) == 0)
    return row, column, rows, width, columns, aligned


@triton.jit
def first_row_of(entry: tl.tensor) -> tl.tensor:
    """The number of the entry's first row in the count over the whole list."""
    return tl.load(entry + _FIRST_ROW)


@triton.jit
def parts_of(entry: tl.tensor) -> tl.tensor:
    """How many pieces a row of the entry is cut into."""
    return tl.load(entry + _PARTS)


@triton.jit
def pieces_of(entries: tl.tensor, index: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The first piece of this entry, and how many it has."""
    entry = entries + index.to(tl.int64) * _ENTRY
    return tl.load(entry + _FIRST_PIECE), tl.load(entry + _PIECES)


@triton.jit
def pointer(
    entry: tl.tensor, LIST: tl.constexpr, offset: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
) -> tl.tensor:
    """To element `offset` of the entry's tensor in this list."""
    address = tl.load(entry + _ADDRESSES + LIST) + offset * (DTYPE.primitive_bitwidth // 8)
    found = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def whole_vectors(count: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """The count; if it is known to be a multiple of the vector length, in a form that shows this to the compiler."""
    if ALIGNED:
        count = count // (128 // DTYPE.primitive_bitwidth) * (128 // DTYPE.primitive_bitwidth)
    return count


@triton.jit
def change_bits(
    x: tl.tensor, ref: tl.tensor, offsets: tl.tensor, inside: tl.tensor, HAS_REFS: tl.constexpr
) -> tl.tensor:
    """The absolute changes as float32 bit patterns: integers with the order of the values, NaN above all."""
    change = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_REFS:
        change = change - tl.load(ref + offsets, mask=inside, other=0.0).to(tl.float32)
    return change.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def add_up(parts: tl.tensor, count: tl.tensor, LARGEST: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """The sum of these numbers in a fixed order, or their maximum if LARGEST; none is negative then."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32 if LARGEST else tl.float32)
    for begin in range(0, count, BLOCK):
        part = tl.load(parts + begin + lane, mask=begin + lane < count, other=0.0)
        total = tl.maximum(total, part.to(tl.int32, bitcast=True)) if LARGEST else total + part
    return tl.max(total, 0).to(tl.float32, bitcast=True) if LARGEST else tl.sum(total, 0)
