"""`scale_neurons_`: prune, mask or damp whole neurons."""

from collections.abc import Iterable

import torch
from torch import Tensor

from bdfast.ops import calling, checks


@torch.no_grad()
def scale_neurons_(params: Iterable[Tensor], scale: Tensor) -> None:
    """Multiply every neuron by a factor of its own, in place.

    `params[i][j, ...] *= scale[r]` for row j of tensor i, with r counting the rows in list order. A factor of 0
    prunes a neuron; a mask of zeros and ones on gradients freezes neurons.

    Args:
        params: T tensors, each [rows_i, ...]; float32, bfloat16, float16 or float64; one dtype, one device.
            Changed in place.
        scale: [R] float32 on the device of `params`.

    Raises:
        ValueError: A scale of another length or on another device, or memory in `params` that is reached
            twice. Nothing has been changed then.
        TypeError: A wrong dtype or layout, or no tensor at all. The messages name the index.

    Notes:
        The product is taken in float32 and rounded once; equal on all backends, to the bit. As in any
        multiplication 0 times NaN or inf is NaN.
        Backends: cpu, cuda, triton, torch.
    """
    op = "scale_neurons_"
    lists = {"params": checks.as_list(op, "params", params)}

    def check(passed: checks.Lists) -> None:
        checks.check_lists(op, passed)
        like = ("params", passed["params"])
        checks.check_vector(op, "scale", scale, torch.float32, like)
        checks.check_writable(op, *like)

    calling.run(op, lists, scale, check=check, empty=lambda: None, written=("params",))
