"""`sharp_step_`: restore the saved weights and take an SGD step from them, in one pass."""

from collections.abc import Iterable

import torch
from torch import Tensor

from bdfast.ops import aliasing, calling, checks


def sharp_step_(
    params: Iterable[Tensor],
    saved: Iterable[Tensor],
    grads: Iterable[Tensor],
    momentum_buffers: Iterable[Tensor] | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    first_grads: Iterable[Tensor] | None = None,
    alpha: float = 1.0,
    maximize: bool = False,
    reference: Iterable[Tensor] | None = None,
) -> Tensor | None:
    """Take one SGD step from the saved weights, with a mix of two gradients, in one pass over memory.

    With w = saved[i], g1 = first_grads[i], g2 = grads[i], b = momentum_buffers[i], as in `torch.optim.SGD`:

        g = (1 - alpha) g1 + alpha g2;   g = -g if maximize;   g += weight_decay * w
        b = momentum * b + (1 - dampening) * g;   g = g + momentum * b if nesterov else b      (with momentum)
        params[i] = w - lr * g

    Args:
        params: T tensors, each [rows_i, ...]; float32, bfloat16, float16 or float64; one dtype, one device.
            Overwritten; their old values, such as perturbed weights, are not read.
        saved: T tensors with the shapes and strides of `params`: the weights to start from, see `perturb_`. Each may
            be the same tensor as `params[i]`, for a plain step.
        grads: T tensors alike: the gradients g2.
        momentum_buffers: T tensors alike, changed in place; needed with `momentum`. Start with zeros; for the very
            first step `torch.optim.SGD` ignores `dampening`, so pass 0 there.
        lr: Learning rate.
        momentum: Factor on the buffers.
        dampening: The gradient enters the buffers with factor 1 - dampening.
        nesterov: Nesterov momentum.
        weight_decay: L2 penalty, on the saved weights.
        first_grads: T tensors alike: the gradients g1 at the saved weights; needed with alpha other than 1.
        alpha: Weight of g2 in the mix.
        maximize: Gradient ascent, for unlearning.
        reference: T tensors alike; the distance to them is returned.

    Returns:
        [] float32, the squared distance of the new weights to `reference`, before they are rounded to a 16-bit dtype;
        its square root is the `norm` of the next `perturb_` along the path. None without `reference`.

    Raises:
        ValueError: Lists differ in length, shape, strides or device, a list that an option needs is missing, one that
            no option uses was passed, or another tensor overlaps `params` or `momentum_buffers`. Nothing was changed
            then.
        TypeError: A dtype or layout is wrong, or an entry is not a tensor. The messages name the index.

    Notes:
        Computed in float32 and rounded once (float64 tensors in float64). 20 bytes per float32 parameter with momentum,
        4 more for `first_grads` and for `reference` each.
        Backends: cpu, cuda, triton, torch.
    """
    op = "sharp_step_"
    for name, tensors, needed, option, value in (
        ("momentum_buffers", momentum_buffers, momentum != 0, "momentum", momentum),
        ("first_grads", first_grads, alpha != 1, "alpha", alpha),
    ):
        if needed != (tensors is not None):
            raise ValueError(
                f"{op}: {name}: expected {'a list' if needed else 'none'} with {option}={value:g}, got "
                f"{'none' if needed else 'a list'}; {f'pass {name}' if needed else f'leave {name} out'} or change "
                f"{option}."
            )
    given = {
        "params": params,
        "saved": saved,
        "grads": grads,
        "momentum_buffers": momentum_buffers,
        "first_grads": first_grads,
        "reference": reference,
    }
    lists = {name: None if tensors is None else checks.as_list(op, name, tensors) for name, tensors in given.items()}
    written = ("params", "momentum_buffers")

    def check(passed: checks.Lists) -> None:
        checks.check_lists(op, passed)
        for name in written:
            checks.check_writable(op, name, passed.get(name, []))
        present = [name for name in written if name in passed]
        aliasing.check_apart(op, passed, present, same_as_first=("saved",))

    squared_distance = calling.run(
        op,
        lists,
        lr,
        momentum,
        dampening,
        nesterov,
        weight_decay,
        alpha,
        maximize,
        check=check,
        empty=lambda: torch.zeros(()),
        written=written,
    )
    return None if reference is None else squared_distance
