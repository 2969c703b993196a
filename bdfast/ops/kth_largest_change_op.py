"""`kth_largest_change`: the threshold above which a given number of sub-weights changed."""

from collections.abc import Iterable

import torch
from torch import Tensor

from bdfast.ops import calling, cautions, checks


def kth_largest_change(xs: Iterable[Tensor], refs: Iterable[Tensor], neurons: Tensor, q: int) -> Tensor:
    """The exact q-th largest change among the sub-weights of the selected neurons, without sorting.

    Args:
        xs: T tensors, each [rows_i, ...]; float32, bfloat16, float16 or float64; one dtype, one device.
        refs: T tensors with the shapes and strides of `xs`.
        neurons: [R] bool, True for the neurons that take part, in list order.
        q: 1 (the largest change) to the number of sub-weights of the selected neurons.

    Returns:
        [] float32 on the device of `xs`: one of the changes. NaN counts as the largest, as in `torch.sort`.
        Backends cuda and triton return NaN if `q` exceeds the number of selected sub-weights: a check would make the
        host wait for the device. The result has no gradient; a warning is given once if a tensor requires one outside
        of `torch.no_grad()`.

    Raises:
        ValueError: `q` is out of range, the mask has another length, or lists differ in length, shape, strides or
            device.
        TypeError: A dtype or layout is wrong, or an entry is not a tensor. The messages name the index.

    Notes:
        Equal bits on all backends. This is the threshold of the sub-weight reinitialisation in TSBD
        (Lin et al., NeurIPS 2024), with q = floor(m * sub-weights of the selected neurons).
        Backends: cpu, cuda, triton, torch.
    """
    op = "kth_largest_change"
    if isinstance(q, bool) or not isinstance(q, int):
        raise TypeError(f"{op}: q: expected an int, got a {type(q).__name__}; round it down to a count of sub-weights.")
    lists = {"xs": checks.as_list(op, "xs", xs), "refs": checks.as_list(op, "refs", refs)}
    cautions.warn_without_gradient(op, lists)

    def check(passed: checks.Lists) -> None:
        checks.check_lists(op, passed)
        checks.check_vector(op, "neurons", neurons, torch.bool, ("xs", passed["xs"]))
        if q < 1 or not passed["xs"]:
            raise ValueError(
                f"{op}: q: expected 1 (the largest) up to the number of sub-weights of the selected neurons, got {q}; "
                "raise q and select at least one neuron."
            )

    return calling.run(op, lists, neurons, q, check=check, empty=lambda: None)
