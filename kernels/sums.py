"""Sums of the results of the pieces of flat lists, in the order of the pieces."""

import triton
import triton.language as tl
from torch import Tensor

from bdfast.kernels.pieces import add_up, pieces_of
from bdfast.kernels.signatures import signatures
from bdfast.kernels.tables import Table, launch


@triton.jit(do_not_specialize=["count"])
def add_pieces(
    entries: tl.tensor,
    parts: tl.tensor,
    result: tl.tensor,
    count: tl.tensor,
    PER_TENSOR: tl.constexpr,
    ROOT: tl.constexpr,
) -> None:
    """The sum over the pieces of one tensor, or of all, or its square root."""
    if PER_TENSOR:
        first, pieces = pieces_of(entries, tl.program_id(0))
        total = add_up(parts + first, pieces, False, 1024)
    else:
        total = add_up(parts, count, False, 1024)
    tl.store(result + tl.program_id(0), tl.sqrt_rn(total) if ROOT else total)


def combine(table: Table, parts: Tensor, result: Tensor, *, per_tensor: bool, root: bool) -> None:
    """Write the sum of `parts`, or one per tensor, or their square roots."""
    options = {"PER_TENSOR": per_tensor, "ROOT": root}
    launch(add_pieces, len(table.entries) if per_tensor else 1, table.entries, parts, result, len(parts), **options)


SIGNATURES = signatures(
    add_pieces,
    {"entries": "*i64", "parts": "*fp32", "result": "*fp32", "count": "i32"},
    PER_TENSOR=[False, True],
    ROOT=[False, True],
)
