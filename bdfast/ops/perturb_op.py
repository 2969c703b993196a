"""`perturb_`: step away from the weights, and remember where they were."""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from bdfast.ops import aliasing, calling, cautions, checks

Mode = Literal["sam", "asam", "path"]
"""What a direction is made of: the gradient, the gradient times the squared weight, or the way to other weights."""

Scope = Literal["global", "tensor"]
"""Whether the radius holds for the whole model, or for every tensor by itself."""


def perturb_(
    params: Iterable[Tensor],
    dirs: Iterable[Tensor],
    saved: Iterable[Tensor],
    *,
    rho: float,
    mode: Mode = "sam",
    scope: Scope = "global",
    eps: float = 1e-12,
    norm: Tensor | None = None,
) -> Tensor:
    """Save the weights and move them by `rho` along a direction, in place.

    saved[i] = params[i]; params[i] += rho / (norm + eps) * d[i], where with p = params[i] and x = dirs[i]

    * "sam": d = x, norm = ||x||; Foret et al., "Sharpness-aware minimization" (ICLR 2021), eq. 2.
    * "asam": d = p^2 x, norm = ||p x||; Kwon et al., "ASAM" (ICML 2021), eq. 10, without its eta; FT-SAM's step.
    * "path": d = x - p, norm = ||x - p||; the way back to the weights x of PAM (arXiv 2410.09838).

    Where the norm is zero or not finite nothing moves; look at the returned value to tell.

    Args:
        params: T tensors, each [rows_i, ...]; float32, bfloat16, float16 or float64; one dtype, one device.
        dirs: T tensors with the shapes and strides of `params`: gradients, or the weights to move towards. Each may be
            the same tensor as `params[i]`.
        saved: T tensors with the shapes and strides of `params`, overwritten; `sharp_step_` starts from them.
        rho: Length of the step, in the units of the weights. Where rounding to a 16-bit dtype undoes the whole step, a
            warning is given once.
        mode: See above.
        scope: "global": one norm over all tensors; "tensor": each tensor moves by rho along its own direction.
        eps: Added to the norm.
        norm: The norm where it is known already, float32 of the shape that is returned: saves a pass over memory.
            `sharp_step_` gives the one for the next step along a path.

    Returns:
        [] float32 for "global", [T] for "tensor": the norm, on the device of `params`.

    Raises:
        ValueError: An unknown mode or scope, lists that differ in length, shape, strides or device, a norm of another
            shape, or memory of `params` or `saved` that is reached in another way too. Nothing has been changed then.
        TypeError: A wrong dtype or layout, or no tensor at all. The messages name the index.

    Notes:
        Sums in a fixed order: repeatable bit for bit on one backend and machine, whatever the thread count. 20 bytes
        per float32 parameter, 16 with `norm`, 24 for "asam" and "path".
        Backends: cpu, cuda, triton, torch.
    """
    op = "perturb_"
    checks.check_choice(op, "mode", mode, get_args(Mode))
    checks.check_choice(op, "scope", scope, get_args(Scope))
    lists = {name: checks.as_list(op, name, x) for name, x in (("params", params), ("dirs", dirs), ("saved", saved))}
    written = ("params", "saved")
    shape = [] if scope == "global" else [len(lists["params"])]

    def check(passed: checks.Lists) -> None:
        checks.check_lists(op, passed)
        for name in written:
            checks.check_writable(op, name, passed[name])
        if norm is not None:
            checks.check_tensor(op, "norm", norm, torch.float32, ("params", passed["params"]))
            if list(norm.shape) != shape:
                raise ValueError(
                    f"{op}: norm: expected shape {shape} for scope {scope!r}, got {list(norm.shape)}; pass what "
                    "perturb_ returned or the square root of what sharp_step_ returned."
                )
        aliasing.check_apart(op, passed, written, same_as_first=("dirs",), vectors={"norm": norm})

    norms = calling.run(
        op,
        lists,
        norm,
        rho,
        mode,
        scope,
        eps,
        check=check,
        empty=lambda: torch.zeros(shape),
        written=written,
    )
    cautions.warn_of_lost_step(op, lists["params"], lists["dirs"], lists["saved"], norms, rho=rho, mode=mode)
    return norms
