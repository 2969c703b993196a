"""Steps that look around the weights before they move them: perturbation and gradient-norm regularisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

Scope = Literal["global", "tensor"]
"""Whether the radius holds for the gradient of the whole model, or for that of every tensor by itself."""


@contextmanager
def perturbed(
    params: Iterable[torch.Tensor], *, rho: float, scope: Scope = "global", eps: float = 1e-12
) -> Iterator[torch.Tensor]:
    """Inside, the parameters stand at w + rho * g / ||g||; after it at w again, bit for bit, also after an exception.

    Foret et al., "Sharpness-aware minimization" (ICLR 2021), eq. 2. A parameter without gradient stays where it is,
    and so does everything whose gradient norm is zero.

    Args:
        params: Parameters with their gradients in `.grad`.
        rho: Length of the step, in the units of the weights.
        scope: "global": one norm over all gradients; "tensor": each tensor moves by rho along its own gradient.
        eps: Added to the norm.

    Yields:
        The gradient norm: [] for "global", [T] for "tensor", T counting the parameters that have a gradient.
    """
    moving, gradients = _with_gradients(params)
    saved = [parameter.detach().clone() for parameter in moving]
    if not moving:
        yield torch.zeros(())
        return
    norms = torch.stack(torch._foreach_norm(gradients))
    if scope == "global":
        norms = torch.linalg.vector_norm(norms)
    scale = rho / (norms + eps)
    steps = torch._foreach_mul(gradients, list(scale.expand(len(moving))))
    try:
        with torch.no_grad():
            torch._foreach_add_(moving, steps)
        yield norms
    finally:
        with torch.no_grad():
            torch._foreach_copy_(moving, saved)


def gradient_norm_gradients(
    params: Sequence[nn.Parameter],
    loss: Callable[[], torch.Tensor],
    *,
    rho: float,
    alpha: float,
    scope: Scope = "global",
) -> torch.Tensor:
    """Leave in `.grad` the gradient of L(w) + alpha * rho * ||grad L(w)||, by one finite difference.

    That is (1 - alpha) * g1 + alpha * g2 with g1 the gradient at w, which must lie in `.grad` already, and g2 the one
    at w + rho * g1 / ||g1|| (Lin et al., TSBD, NeurIPS 2024, stage 2; Zhao et al., ICML 2022).

    Args:
        params: The parameters that are trained; `.grad` holds g1.
        loss: Computes the loss at the current weights, on the same batch.
        rho: Length of the perturbation.
        alpha: Share of the second gradient.
        scope: As in `perturbed`.

    Returns:
        The norm of g1, as `perturbed` gives it.
    """
    moving, first = _with_gradients(params)
    with perturbed(moving, rho=rho, scope=scope) as norm:
        for parameter in moving:
            parameter.grad = None
        loss().backward()
    for parameter, gradient in zip(moving, first, strict=True):
        if parameter.grad is None:  # used at w only: the second gradient is zero
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.lerp_(gradient, 1 - alpha)
    return norm


def _with_gradients(params: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    pairs = [(parameter, parameter.grad) for parameter in params if parameter.grad is not None]
    return [parameter for parameter, _ in pairs], [gradient for _, gradient in pairs]


def check_finite_gradients(named_params: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Stop before a step that would spread NaN or infinity into the weights.

    Raises:
        FloatingPointError: Names the first parameter whose gradient is not finite.
    """
    named = [(name, parameter.grad) for name, parameter in named_params if parameter.grad is not None]
    if not named:
        return
    norms = torch.stack(torch._foreach_norm([gradient for _, gradient in named]))
    finite = norms.isfinite()
    if bool(finite.all()):
        return
    name = named[int((~finite).nonzero()[0])][0]
    raise FloatingPointError(
        f"{name}: expected a finite gradient, got NaN or infinity; the weights are untouched. Lower the learning "
        "rate, pass amp=False, or look for NaN in images and weights."
    )
