"""PAM: the gradient at weights that are moved towards reference weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bdfast.ops import Mode
from bdfast.ops.lists import laid_out_like, places_of, workable
from bdfast.optim.carried_distance import CarriedDistance, found, measured
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
            distance for the next. The distance is measured again if the weights may have changed in between. In a
            model of more than 65536 weights only a sample of each row is compared, so change single weights in place
            under `torch.no_grad()`, which is always noticed, and not through `.data`.
        reference: The weights to move towards, in the order of `params`; not copied, so leave them as they are. A group
            that is added later may have its own `reference`; the default is a copy of its weights at that time.
        rho: Length of the move, in the units of the weights, over all parameters together.
        **kwargs: Options of the base, such as lr.
    """

    needs_gradient = False
    _checked = "difference to the reference"

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., torch.optim.Optimizer],
        *,
        reference: Iterable[Tensor],
        rho: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, {"rho": rho, "distance": None, "measured": None}, **kwargs)
        self._params: list[Tensor] = []
        self._given: list[Tensor] = []
        self._laid_out: dict[Tensor, Tensor] = {}
        self._places: object = None
        self._carried = CarriedDistance()
        self._add_references([param for group in self.param_groups for param in group["params"]], list(reference))

    def add_param_group(self, param_group: Group) -> None:
        """As of any optimizer; the group may have its own `rho`, and its own `reference`."""
        super().add_param_group(param_group)
        if "_given" not in self.__dict__:  # still in the constructor
            return
        try:
            params = param_group["params"]
            given = param_group.pop("reference", None)
            self._add_references(params, [x.detach().clone() for x in params] if given is None else list(given))
        except BaseException:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Options, momentum, and the distance of the weights that belong to them."""
        self._store()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._store()
        return {name: x for name, x in super().__getstate__().items() if name != "_carried"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._carried = CarriedDistance()

    def _add_references(self, params: list[Tensor], references: list[Tensor]) -> None:
        if [x.shape for x in references] != [param.shape for param in params]:
            raise ValueError(
                f"reference: expected {len(params)} tensors with the shapes of params, got {len(references)}, "
                "or others; pass the parameters of the same network in the same order."
            )
        for index, (param, x) in enumerate(zip(params, references, strict=True)):
            _check_apart(param, x, f"reference[{index}]")
        self._params = [*self._params, *params]
        self._given = [*self._given, *(x.detach() for x in references)]
        self._places = None

    def _lay_out(self) -> None:
        """The references like the parameters, which may have changed their dtype, device and memory format."""
        places = places_of(self._params)
        if places == self._places:
            return
        laid_out = {}
        for param, given, work in zip(self._params, self._given, workable(self._params)[0], strict=True):
            _check_apart(param, given, "reference")
            laid_out[param] = laid_out_like(given, work, "reference")
        self._laid_out, self._places = laid_out, places

    def _mode(self, group: Group) -> Mode:
        return "path"

    def _moves(self, param: Tensor) -> bool:
        return param.requires_grad

    def _direction(self, param: Tensor) -> Tensor:
        return self._laid_out[param]

    def _reference(self, param: Tensor) -> Tensor:
        if param not in self._laid_out:  # added since the first step
            self._lay_out()
        return self._laid_out[param]

    def _known_norm(self) -> Tensor | None:
        """The distance after the last step, unless the weights may have changed since."""
        self._lay_out()
        params, references = self._trained()
        if self._carried:
            distance = self._carried.get(params, references, self._places)
            if distance is None:
                self._carried.forget()
            return distance
        stored = self.param_groups[0]
        if stored["distance"] is None or _is_wide(params):
            return None
        return found(stored["distance"], stored["measured"], params, references)

    def _restored(self) -> None:
        self._carried.renew(*self._trained())

    def _trained(self) -> tuple[list[Tensor], list[Tensor]]:
        params = [param for param in self._params if param.requires_grad]
        return params, [self._reference(param) for param in params]

    def _stepped(self, params: list[Tensor], distance: Tensor | None) -> None:
        self._carried.forget()
        self.param_groups[0] |= {"distance": None, "measured": None}
        if distance is None:
            return
        trained, references = self._trained()
        # Everything that moves must have been stepped for the distance to be that of all.
        if len(params) == len(trained) and not _is_wide(trained):
            self._carried.keep(distance, trained, references, self._places)

    def _store(self) -> None:
        """Put the distance into the first group, from which checkpoints and copies are made."""
        if not self._carried:
            return
        self._lay_out()
        params, references = self._trained()
        distance = self._carried.get(params, references, self._places)
        self.param_groups[0] |= {"distance": None, "measured": None}
        if distance is not None:
            self.param_groups[0] |= {"distance": float(distance), "measured": measured(params, references)}


def _check_apart(param: Tensor, x: Tensor, name: str) -> None:
    strided = x.layout is torch.strided and param.layout is torch.strided
    if strided and x.numel() and x.data_ptr() == param.data_ptr():
        raise ValueError(
            f"{name}: expected memory of its own, got that of the parameter, which is trained; "
            "pass the parameters of copy.deepcopy(model)."
        )


def _is_wide(params: list[Tensor]) -> bool:
    """The ops return the distance in float32, which is too little for weights in float64."""
    return any(param.dtype == torch.float64 for param in params)
