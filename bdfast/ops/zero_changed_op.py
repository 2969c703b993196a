"""`zero_changed_`: zero the sub-weights that changed most."""

from collections.abc import Iterable

import torch
from torch import Tensor

from bdfast.ops import aliasing, calling, checks


def zero_changed_(
    params: Iterable[Tensor],
    xs: Iterable[Tensor],
    refs: Iterable[Tensor],
    neurons: Tensor,
    tau: Tensor | float,
) -> Tensor:
    """Set to zero, in place, every sub-weight of the selected neurons whose change is at least `tau`.

    `params[i][j, ...] = 0` where `neurons[r] and abs(xs[i][j, ...] - refs[i][j, ...]) >= tau`. Ties with `tau`
    are zeroed as well. Sub-weights with a NaN change are kept, unless `tau` is NaN: then exactly these are zeroed.

    Args:
        params: T tensors, each [rows_i, ...]; float32, bfloat16, float16 or float64; one dtype, one device.
            Changed in place; each may be the same tensor as `xs[i]` or `refs[i]`.
        xs: T tensors with the shapes and strides of `params`.
        refs: T tensors with the shapes and strides of `params`.
        neurons: [R] bool, True for the neurons that take part, in list order.
        tau: The threshold, [] float32 on the device of `params` or a number; see `kth_largest_change`.

    Returns:
        [] int64 on the device of `params`: the number of sub-weights that were selected, zero before or not.

    Raises:
        ValueError: Lists differ in length, shape, strides or device, the mask has another length, or another tensor
            overlaps `params`. Nothing was changed then.
        TypeError: A dtype or layout is wrong, or an entry is not a tensor. The messages name the index.

    Notes:
        Equal bits on all backends. The zero reinitialisation of TSBD (Lin et al., NeurIPS 2024).
        Backends: cpu, cuda, triton, torch.
    """
    op = "zero_changed_"
    lists = {
        "params": checks.as_list(op, "params", params),
        "xs": checks.as_list(op, "xs", xs),
        "refs": checks.as_list(op, "refs", refs),
    }
    written = ("params",)
    if not isinstance(tau, Tensor):
        tau = torch.full((), tau, dtype=torch.float32, device=getattr(neurons, "device", None))

    def check(passed: checks.Lists) -> None:
        checks.check_lists(op, passed)
        like = ("params", passed["params"])
        checks.check_vector(op, "neurons", neurons, torch.bool, like)
        checks.check_tensor(op, "tau", tau, torch.float32, like)
        if tau.ndim != 0:
            raise ValueError(f"{op}: tau: expected shape [], got {list(tau.shape)}; call tau.reshape(()).")
        checks.check_writable(op, *like)
        vectors = {"neurons": neurons, "tau": tau}
        aliasing.check_apart(op, passed, written, same_as_first=("xs", "refs"), vectors=vectors)

    def empty() -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=neurons.device)

    return calling.run(op, lists, neurons, tau, check=check, empty=empty, written=written)
