"""The step of `torch.optim.SGD` as one pass over memory that starts from the saved weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bdfast import ops
from bdfast.ops.lists import euclidean, grouped, kind, or_zeros, with_rows


def sgd_step(
    state: dict[Tensor, Any],
    stepping: list[tuple[dict[str, Any], Tensor]],
    saved: list[Tensor],
    seconds: list[Tensor],
    firsts: list[Tensor] | None,
    references: list[Tensor | None],
    *,
    alpha: float,
) -> Tensor | None:
    """One call of `bdfast.ops.sharp_step_` for all parameters that share options, dtype and device.

    Args:
        state: Of the optimizer; holds the momentum as `torch.optim.SGD` keeps it.
        stepping: T parameters, each with its group of options.
        saved: T tensors: the weights to start from.
        seconds: T tensors: the gradients at the perturbed weights.
        firsts: T tensors: those at the saved ones, where they are mixed in.
        references: T tensors to return the distance to, or None.
        alpha: Share of `seconds`.

    Returns:
        [] the distance of the new weights to the references, over all of them; None without.
    """
    keys = []
    for group, param in stepping:
        # torch's SGD leaves the dampening out of the first step.
        fresh = state[param].get("momentum_buffer") is None
        options = [float(group[name]) for name in ("lr", "momentum", "nesterov", "weight_decay", "maximize")]
        keys.append((*options, 0.0 if fresh else group["dampening"], *kind(param)))
    distances = []
    for key, places in grouped(zip(keys, range(len(keys)), strict=True)).items():
        lr, momentum, nesterov, weight_decay, maximize, dampening, *_ = key
        params = [stepping[i][1] for i in places]
        there = [with_rows(x) for i in places if (x := references[i]) is not None]
        if momentum:
            for param in params:
                state[param]["momentum_buffer"] = or_zeros(state[param].get("momentum_buffer"), param)
        squared = ops.sharp_step_(
            [with_rows(param.detach()) for param in params],
            [with_rows(saved[i]) for i in places],
            [with_rows(seconds[i]) for i in places],
            [with_rows(state[param]["momentum_buffer"]) for param in params] if momentum else None,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            nesterov=bool(nesterov),
            weight_decay=weight_decay,
            first_grads=None if firsts is None else [with_rows(firsts[i]) for i in places],
            alpha=alpha,
            maximize=bool(maximize),
            reference=there or None,
        )
        if squared is not None:
            distances.append(torch.sqrt(squared))
    return euclidean(distances) if distances else None
