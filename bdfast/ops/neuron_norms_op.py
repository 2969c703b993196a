"""`neuron_norms`: the norm of the change, or of the gradient, of every neuron."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from bdfast.ops import calling, cautions, checks


def neuron_norms(xs: Iterable[Tensor], refs: Iterable[Tensor] | None = None, *, ord: float = 1) -> Tensor:
    """Norm of every neuron of a list of parameters, in one pass.

    `out[r] = || xs[i][j] - refs[i][j] ||_ord` for row j of tensor i, with r counting the rows in list order.

    Args:
        xs: T tensors, each [rows_i, ...]; float32, bfloat16, float16 or float64; one dtype, one device.
        refs: None for zeros, or T tensors with the shapes and strides of `xs`.
        ord: 1, 2 or inf.

    Returns:
        [R] float32 on the device of `xs`; 0 for rows without columns. The result has no gradient; a warning is given
        once if a tensor requires one outside of `torch.no_grad()`.

    Raises:
        ValueError: `ord` is another number, or lists differ in length, shape, strides or device.
        TypeError: A dtype or layout is wrong, or an entry is not a tensor. The messages name the index.

    Notes:
        Differences and sums are float32, in a fixed order: the same bits on one backend and machine for any thread
        count; backends differ by a few ulp. A NaN affects only its row. `ord=2` squares, so
        changes beyond 1e19 overflow to inf. With `ord=1` and the weights before and after unlearning this is
        the neuron weight change of TSBD (Lin et al., NeurIPS 2024), with gradients its neuron activeness.
        Backends: cpu, cuda, triton, torch.
    """
    if ord not in (1, 2, math.inf):
        raise ValueError(f"neuron_norms: ord: expected 1, 2 or inf, got {ord!r}; choose one of these.")
    op = "neuron_norms"
    lists = {"xs": checks.as_list(op, "xs", xs), "refs": None if refs is None else checks.as_list(op, "refs", refs)}

    cautions.warn_without_gradient(op, lists)

    def check(passed: checks.Lists) -> None:
        checks.check_lists(op, passed)

    return calling.run(op, lists, float(ord), check=check, empty=lambda: torch.zeros(0))
