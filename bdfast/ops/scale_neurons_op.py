"""`scale_neurons_`: prune, mask or damp whole neurons."""

from collections.abc import Iterable

import torch
from torch import Tensor

from bdfast.ops import aliasing, calling, checks


def scale_neurons_(params: Iterable[Tensor], scale: Tensor) -> None:
    """Multiply every neuron by a factor of its own, in place.

    `params[i][j, ...] *= scale[r]` for row j of tensor i, with r counting the rows in list order. A factor of 0
    prunes a neuron; a mask of zeros and ones on gradients freezes neurons.

    Args:
        params: T tensors, each [rows_i, ...]; float32, bfloat16, float16 or float64; one dtype, one device.
            Changed in place.
        scale: [R] float32 on the device of `params`.

    Raises:
        ValueError: The scale has another length or device, or another tensor overlaps `params`. Nothing was changed
            then.
        TypeError: A dtype or layout is wrong, or an entry is not a tensor. The messages name the index.

    Notes:
        The product is taken in float32 and rounded once; equal bits on all backends. As in any multiplication, 0 times
        NaN or inf is NaN.
        Backends: cpu, cuda, triton, torch.
    """
    op = "scale_neurons_"
    lists = {"params": checks.as_list(op, "params", params)}
    written = ("params",)

    def check(passed: checks.Lists) -> None:
        checks.check_lists(op, passed)
        like = ("params", passed["params"])
        checks.check_vector(op, "scale", scale, torch.float32, like)
        checks.check_writable(op, *like)
        aliasing.check_apart(op, passed, written, vectors={"scale": scale})

    calling.run(op, lists, scale, check=check, empty=lambda: None, written=written)
