"""SAM and ASAM: the gradient at the worst weights nearby."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bdfast.ops import Mode
from bdfast.optim.sharp_optimizer import Group, SharpOptimizer


class SAM(SharpOptimizer):
    """Sharpness-aware minimization; takes the place of the common `SAM` class, call for call.

        optimizer = bdfast.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        loss(model).backward()
        optimizer.first_step(zero_grad=True)
        loss(model).backward()
        optimizer.second_step(zero_grad=True)

    or, with the first gradient there already, `optimizer.step(closure)` with a closure that does the second pass.

    Foret et al. (ICLR 2021), algorithm 1: w' = w + rho g / ||g||. Adaptive, Kwon et al. (ICML 2021), eq. 10 without its
    eta: w' = w + rho w^2 g / ||w g||. One norm over all groups. With `surrogate_gap`, Zhuang et al. (ICLR 2022): the
    part of the first gradient that is perpendicular to the second is subtracted, times that factor.

    Args:
        params: Parameters, named parameters or groups; a group may have its own `rho` and `adaptive`.
        base_optimizer: Class of the base, such as `torch.optim.SGD`, whose step is one pass over memory.
        rho: Radius, in the units of the weights; when adaptive, relative to each of them.
        adaptive: ASAM.
        surrogate_gap: The alpha of GSAM; 0 is plain SAM, and costs nothing.
        **kwargs: Options of the base, such as lr.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        surrogate_gap: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, {"rho": rho, "adaptive": adaptive}, **kwargs)
        self.surrogate_gap = surrogate_gap
        self.keeps_first = surrogate_gap != 0

    def _mode(self, group: Group) -> Mode:
        return "asam" if group["adaptive"] else "sam"

    def _share_of_second(self, firsts: list[Tensor], seconds: list[Tensor]) -> float:
        if not self.keeps_first:
            return 1.0
        # g2 - a (g1 - c g2) with c = <g1, g2> / ||g2||^2, as a mix (1 - s) g1 + s g2' with s = 1 + a.
        device = seconds[0].device
        products = [(a.float() * b.float()).sum().to(device) for a, b in zip(firsts, seconds, strict=True)]
        squares = [b.float().square().sum().to(device) for b in seconds]
        ratio = torch.stack(products).sum() / torch.stack(squares).sum().clamp_min(torch.finfo(torch.float32).tiny)
        for second in seconds:
            second.mul_(((1 + self.surrogate_gap * ratio) / (1 + self.surrogate_gap)).to(second.device))
        return 1 + self.surrogate_gap
