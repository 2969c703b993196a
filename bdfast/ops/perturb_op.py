"""`perturb_`: save the weights and move them along a direction."""

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor

from bdfast.ops import aliasing, calling, cautions, checks

Mode = Literal["sam", "asam", "path"]
"""The direction: the gradient, the gradient times the squared weight, or the difference to other weights."""

Scope = Literal["global", "tensor"]
"""Whether the radius applies to the whole model or to each tensor separately."""


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
    * "path": d = x - p, norm = ||x - p||; PAM's step towards the weights x (arXiv 2410.09838).

    If the norm is zero or not finite, the weights do not move; the returned norm shows it.

    Args:
        params: T tensors, each [rows_i, ...]; float32, bfloat16, float16 or float64; one dtype, one device.
        dirs: T tensors with the shapes and strides of `params`: gradients, or the weights to move towards. Each may be
            the same tensor as `params[i]`.
        saved: T tensors with the shapes and strides of `params`, overwritten; `sharp_step_` starts from them.
        rho: Length of the step, in the units of the weights. A warning is given once if rounding to a 16-bit dtype
            undoes a whole step.
        mode: See above.
        scope: "global": one norm over all tensors; "tensor": each tensor moves by rho along its own direction.
        eps: Added to the norm.
        norm: The norm if it is already known, float32 of the returned shape: saves a pass over memory. For steps along
            a path, `sharp_step_` returns its square.

    Returns:
        [] float32 for "global", [T] for "tensor": the norm, on the device of `params`.

    Raises:
        ValueError: The mode or scope is unknown, lists differ in length, shape, strides or device, the norm has another
            shape, or another tensor overlaps `params` or `saved`. Nothing was changed then.
        TypeError: A dtype or layout is wrong, or an entry is not a tensor. The messages name the index.

    Notes:
        Sums are taken in a fixed order: the same bits on one backend and machine for any thread count. Moves 20 bytes
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
