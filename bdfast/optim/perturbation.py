"""Weights that are perturbed inside a `with` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bdfast.ops import Mode, Scope
from bdfast.optim.saved_weights import Move, SavedWeights


@contextmanager
def perturbed(
    params: Iterable[Tensor],
    *,
    rho: float,
    mode: Mode = "sam",
    scope: Scope = "global",
    reference: Iterable[Tensor] | None = None,
    eps: float = 1e-12,
) -> Iterator[Tensor]:
    """Inside the block the parameters are w + rho * d / ||d||, after it w, bit for bit, also after an exception.

    d is the gradient in `.grad` ("sam", Foret et al., ICLR 2021), the gradient times the squared weight ("asam"), or
    the difference from w to `reference` ("path"); see `bdfast.ops.perturb_`. A parameter without gradient does not
    move, and nothing moves whose norm is zero or not finite.

    Args:
        params: Parameters of one dtype on one device.
        rho: Length of the step, in the units of the weights; negative for the other direction.
        mode: See above.
        scope: "global": one norm over everything; "tensor": each tensor moves by rho along its own direction.
        reference: For "path": tensors with the shapes of `params`, in their order.
        eps: Added to the norm.

    Yields:
        The norm: [] for "global", [T] for "tensor", T counting the parameters that move.

    Raises:
        ValueError: `reference` is missing or superfluous, or lists differ; nothing was changed.
    """
    if (reference is not None) != (mode == "path"):
        raise ValueError(
            f"reference: expected the weights to move towards with mode 'path', and nothing with another, got mode "
            f"{mode!r} {'without' if reference is None else 'with'} them; pass both or neither."
        )
    given = list(params)
    directions = [param.grad for param in given] if reference is None else list(reference)
    pairs = [(param, x) for param, x in zip(given, directions, strict=True) if x is not None]
    move = Move(rho, mode, [param for param, _ in pairs], [x for _, x in pairs])
    weights = SavedWeights()
    grad_mode = torch.is_grad_enabled()
    try:
        with torch.no_grad():
            norms = weights.perturb([move], scope=scope, eps=eps)
        yield norms[0]
        weights.put_back()
    except BaseException:
        torch.set_grad_enabled(grad_mode)
        weights.put_back()
        raise
