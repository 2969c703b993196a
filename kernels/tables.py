"""Host code of a launch: lists of tensors as one table on their device, and how the work is split into pieces.

A table holds addresses, so one launch can process any number of tensors of any shapes. Tables are kept: a repeated call
uploads nothing and does not wait for the device.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

# Elements of a piece, the work of one program. Longer rows are split. The pieces depend on shapes, never on the device,
# so results combined in their order always have the same bits.
PIECE = 1 << 14

# The fields of a table entry. The addresses of its tensors follow, in the order of the lists. The size of an entry is a
# multiple of 16 bytes.
FIELDS = ("columns", "rows", "first_row", "first_piece", "pieces", "parts", "rows_per_piece", "aligned")
LISTS = 6
ENTRY = len(FIELDS) + LISTS

# Tiles have 2048 elements, [rows, columns]; their shape depends on whether rows have up to this many columns.
NARROW = 8
MIDDLE = 256
# Most tiles per program, so that lists of short rows are distributed too.
TILES = 8
VECTOR_BYTES = 16

KEPT_TABLES = 32

# No fused multiply-add, so the same numbers give the same bits in aligned and unaligned code. Without a register limit
# ptxas spills registers to fit one more program on a multiprocessor.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False, "maxnreg": 128}

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Table:
    """The table of one call.

    Attributes:
        entries: [tensors, ENTRY] int64, by `FIELDS` and addresses.
        pieces: [pieces] int64, the entry that each piece belongs to.
        rows: Of all tensors.
        cut: Whether a row has more than one piece.
    """

    entries: Tensor
    pieces: Tensor
    rows: int
    cut: bool


_tables: OrderedDict[Any, Table] = OrderedDict()
# A CUDA graph reads its tables as long as it exists.
_tables_of_graphs: dict[Any, Table] = {}
_lock = threading.Lock()


def table_of(lists: Sequence[Sequence[Tensor]], *, flat: bool = False) -> Table:
    """The table of these lists. Empty lists were left out; the first is never left out.

    Args:
        lists: Up to `LISTS` lists of tensors, equal in shapes and strides, with dense rows.
        flat: Take every tensor for one long row.
    """
    lead = lists[0]
    device = lead[0].device
    # A table is used only on the stream that uploads it and that owns its memory.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    shapes = tuple([(x.shape[0], x.numel()) for x in lead])
    addresses = tuple([tuple([x.data_ptr() for x in tensors]) for tensors in lists])
    key = (flat, device, stream, lead[0].dtype, shapes, addresses)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _lock:
        if (table := _tables.get(key) or _tables_of_graphs.get(key)) is not None:
            if key in _tables:
                _tables.move_to_end(key)
            if capturing:
                _tables_of_graphs[key] = table
            return table
    if capturing:
        raise RuntimeError(
            "bdfast: a CUDA graph is being captured, and these tensors are new to bdfast on this stream; run the call "
            "once with the same tensors on the same stream before capturing it."
        )
    table = _make_table(shapes, addresses, lead[0].itemsize, device, flat)
    with _lock:
        _tables[key] = table
        if len(_tables) > KEPT_TABLES:
            _tables.popitem(last=False)
    return table


def _rows_per_piece(columns: int) -> int:
    tile_rows = 512 if columns <= NARROW else 64 if columns <= MIDDLE else 2
    return max(1, min(TILES * tile_rows, PIECE // max(1, columns)))


def _make_table(
    shapes: Sequence[tuple[int, int]],
    addresses: Sequence[Sequence[int]],
    itemsize: int,
    device: torch.device,
    flat: bool,
) -> Table:
    entries, counts = [], []
    first_row = first_piece = 0
    for i, (rows, numel) in enumerate(shapes):
        if flat:
            rows, columns = min(1, numel), numel
        else:
            columns = numel // max(1, rows)
        here = [tensors[i] if tensors else 0 for tensors in addresses]
        parts = max(1, -(-columns // PIECE))
        rows_per_piece = _rows_per_piece(columns)
        counts.append(parts * -(-rows // rows_per_piece))
        aligned = all(address % VECTOR_BYTES == 0 for address in here)
        aligned = aligned and (rows <= 1 or columns * itemsize % VECTOR_BYTES == 0)
        fields = [columns, rows, first_row, first_piece, counts[-1], parts, rows_per_piece, int(aligned)]
        entries.append([*fields, *here, *[0] * (LISTS - len(here))])
        first_row += rows
        first_piece += counts[-1]
    pieces = torch.arange(len(shapes)).repeat_interleave(torch.tensor(counts), output_size=first_piece)
    uploaded = torch.cat([torch.tensor(entries, dtype=torch.int64).flatten(), pieces])
    if device.type == "cuda":
        # A copy from pinned memory is asynchronous; otherwise the host would wait for it.
        uploaded = uploaded.pin_memory().to(device, non_blocking=True)
    size = len(entries) * ENTRY
    cut = any(entry[FIELDS.index("parts")] > 1 and entry[FIELDS.index("rows")] for entry in entries)
    return Table(uploaded[:size].view(-1, ENTRY), uploaded[size:], first_row, cut)


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch this many programs of a kernel, if any, on the device of its first argument."""
    if programs == 0:
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants, **OPTIONS)
