"""PAM: the gradient on the way back to the weights that one wants to leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bdfast.ops import Mode
from bdfast.ops.lists import laid_out_like
from bdfast.optim.sharp_optimizer import Group, SharpOptimizer


class PAM(SharpOptimizer):
    """Path-aware minimisation (Min et al., "Uncovering, explaining, and mitigating the superficial safety of backdoor
    defense", NeurIPS 2024, arXiv 2410.09838).

    The gradient is taken at w + rho d / ||d|| with d = reference - w, and the step is taken from w: one pass a step.

        optimizer = bdfast.PAM(model.parameters(), torch.optim.SGD, reference=backdoored.parameters(), lr=0.01)
        optimizer.first_step(zero_grad=True)
        loss(model).backward()
        optimizer.second_step()

    or `optimizer.step(closure)` with a closure that computes loss and gradients. As long as w is less than rho away,
    the gradient is taken beyond the reference; at the reference itself it is taken there.

    Args:
        params: Parameters, named parameters or groups; a group may have its own `rho`.
        base_optimizer: Class of the base, such as `torch.optim.SGD`, whose step is one pass over memory and gives the
            distance for the next.
        reference: The weights to look back at, in the order of `params`; kept by reference, so leave them as they are.
        rho: Length of the way back, in the units of the weights, over all parameters together.
        **kwargs: Options of the base, such as lr.
    """

    needs_gradient = False
    _checked = "way back to the reference"

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., torch.optim.Optimizer],
        *,
        reference: Iterable[Tensor],
        rho: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, {"rho": rho}, **kwargs)
        everything = [param for group in self.param_groups for param in group["params"]]
        references = [x.detach() for x in reference]
        if [x.shape for x in references] != [param.shape for param in everything]:
            raise ValueError(
                f"reference: expected {len(everything)} tensors with the shapes of params, got {len(references)}, "
                "or others; pass the parameters of the same network in the same order."
            )
        for index, (x, param) in enumerate(zip(references, everything, strict=True)):
            if x.numel() and x.data_ptr() == param.data_ptr():
                raise ValueError(
                    f"reference[{index}]: expected memory of its own, got that of the parameter, which is trained; "
                    "pass the parameters of copy.deepcopy(model)."
                )
        self._references = {x: laid_out_like(y.to(x.device), x) for x, y in zip(everything, references, strict=True)}
        self._versions: int | None = None

    def _mode(self, group: Group) -> Mode:
        return "path"

    def _moves(self, param: Tensor) -> bool:
        return param.requires_grad

    def _direction(self, param: Tensor) -> Tensor:
        return self._references[param]

    def _reference(self, param: Tensor) -> Tensor | None:
        return self._references[param]

    def _known_norm(self) -> Tensor | None:
        """The distance that the last step ended at, unless somebody else has changed the weights since.

        The ops return it in float32, which is too little for weights in float64.
        """
        if any(param.dtype == torch.float64 for param in self._references):
            return None
        norm = self.state.get("path", {}).get("norm")  # type: ignore[call-overload]
        return norm if norm is not None and self._versions in (None, self._version()) else None

    def _stepped(self, params: list[Tensor], distance: Tensor | None) -> None:
        # Everything that moves must have been stepped for the distance to be that of all.
        moving = sum(param.requires_grad for param in self._references)
        known = distance is not None and len(params) == moving
        self.state["path"] = {"norm": distance if known else None}  # type: ignore[index]
        self._versions = self._version()

    def _version(self) -> int:
        return sum(param._version for param in self._references)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Options, momentum, and the distance of the weights that belong to them."""
        super().load_state_dict(state_dict)
        self._versions = None
