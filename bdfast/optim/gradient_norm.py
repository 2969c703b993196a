"""A penalty on the norm of the gradient, by one finite difference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bdfast.ops import Scope
from bdfast.optim.sharp_optimizer import SharpOptimizer


class GradientNorm(SharpOptimizer):
    """Descends L(w) + alpha * rho * ||grad L(w)||; used like `SAM`.

    Its gradient is (1 - alpha) g1 + alpha g2 with g1 the gradient at w and g2 the one at w + rho g1 / ||g1||, up to the
    finite difference (Zhao et al., "Penalizing gradient norm", ICML 2022, eq. 12; stage 2 of TSBD, Lin et al., NeurIPS
    2024). alpha = 1 is SAM.

    Args:
        params: Parameters, named parameters or groups; a group may have its own `rho`.
        base_optimizer: Class of the base, such as `torch.optim.SGD`, whose step is one pass over memory.
        rho: Length of the perturbation, in the units of the weights.
        alpha: Share of the second gradient, in [0, 1].
        scope: "global": one norm over all gradients, as in the formula; "tensor": every tensor moves by rho along its
            own gradient and the norms are added, as TSBD's code does.
        **kwargs: Options of the base, such as lr.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., torch.optim.Optimizer],
        rho: float = 0.05,
        alpha: float = 0.7,
        *,
        scope: Scope = "global",
        **kwargs: Any,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a share in [0, 1], got {alpha}; 0.7 is common.")
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)
        self.alpha, self.scope = alpha, scope
        self.keeps_first = alpha != 1

    def _share_of_second(self, firsts: list[Tensor], seconds: list[Tensor]) -> float:
        return self.alpha
