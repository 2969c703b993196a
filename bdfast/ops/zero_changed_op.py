"""`zero_changed_`: reset the sub-weights that changed most."""

from collections.abc import Iterable

import torch
from torch import Tensor

from bdfast.ops import calling, checks


@torch.no_grad()
def zero_changed_(
    params: Iterable[Tensor],
    xs: Iterable[Tensor],
    refs: Iterable[Tensor],
    neurons: Tensor,
    tau: Tensor | float,
) -> Tensor:
    """Set to zero, in place, every sub-weight of the selected neurons whose change is at least `tau`.

    `params[i][j, ...] = 0` where `neurons[r] and abs(xs[i][j, ...] - refs[i][j, ...]) >= tau`. Ties with `tau`
    are zeroed as well. A NaN change is not at least any number, so it is left alone, unless `tau` itself is
    NaN: then the NaN changes are the ones that are zeroed.

    Args:
        params: T tensors, each [rows_i, ...]; float32, bfloat16, float16 or float64; one dtype, one device.
            Changed in place; they may be the same tensors as `xs` or `refs`.
        xs: T tensors with the shapes and strides of `params`.
        refs: T tensors with the shapes and strides of `params`.
        neurons: [R] bool, True for the neurons that take part, in list order.
        tau: The threshold, [] float32 on the device of `params` or a number; see `kth_largest_change`.

    Returns:
        [] int64 on the device of `params`: the number of sub-weights that were selected, zero before or not.

    Raises:
        ValueError: Lists that differ in length, shape, strides or device, a mask of another length, or memory
            in `params` that is reached twice. Nothing has been changed then.
        TypeError: A wrong dtype or layout, or no tensor at all. The messages name the index.

    Notes:
        Equal on all backends, to the bit. The zero reinitialisation of TSBD (Lin et al., NeurIPS 2024).
        Backends: cpu, cuda, triton, torch.
    """
    op = "zero_changed_"
    lists = {
        "params": checks.as_list(op, "params", params),
        "xs": checks.as_list(op, "xs", xs),
        "refs": checks.as_list(op, "refs", refs),
    }
    if not isinstance(tau, Tensor):
        tau = torch.full((), tau, dtype=torch.float32, device=getattr(neurons, "device", None))

    def check(passed: checks.Lists) -> None:
        checks.check_lists(op, passed)
        like = ("params", passed["params"])
        checks.check_vector(op, "neurons", neurons, torch.bool, like)
        checks.check_tensor(op, "tau", tau, torch.float32, like)
        if tau.ndim != 0:
            raise ValueError(f"{op}: tau has shape {list(tau.shape)}, expected a single number; call tau.reshape(()).")
        checks.check_writable(op, *like)

    def empty() -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=neurons.device)

    return calling.run(op, lists, neurons, tau, check=check, empty=empty, written=("params",))
