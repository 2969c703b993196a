"""What SAM and its relatives share: a step to other weights, a gradient there, and a step from where it began."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bdfast import ops
from bdfast.ops import Mode, Scope
from bdfast.ops.finite import check_finite
from bdfast.ops.lists import (
    euclidean,
    grouped,
    kind,
    laid_out_like,
    name_of,
    norm_along,
    or_zeros,
    owned,
    with_rows,
)
from bdfast.optim.fused_sgd import sgd_step

Group = dict[str, Any]


class SharpOptimizer(torch.optim.Optimizer):
    """An optimizer that takes its gradient at perturbed weights; `SAM`, `GradientNorm` and `PAM` say which.

    The update is that of a base optimizer. With `torch.optim.SGD` as the base, going back to the weights, mixing two
    gradients, weight decay, momentum and update are one pass over memory (`bdfast.ops.sharp_step_`). The weights come
    back bit for bit, from a copy that is made once and kept.

    Parameters that are frozen, or have no gradient, stay where they are. A gradient that is NaN or infinite stops the
    step with an error that names the parameter (its place in the groups, where the optimizer was not made from
    `model.named_parameters()`), the weights untouched. With a `GradScaler`, give `scaled=True` to `first_step`, scale
    both losses, and end with `scaler.step(optimizer)`, which skips such steps instead.

    Args:
        params: As for any optimizer: parameters, named parameters or groups.
        base_optimizer: Class of the base, such as `torch.optim.SGD`.
        defaults: Options of the subclass, which groups may set by themselves.
        **kwargs: Options of the base.
    """

    # A GradScaler then calls `step` whatever it found, so that a skipped step still restores the weights.
    _step_supports_amp_scaling = True

    scope: Scope = "global"
    keeps_first = False
    """Whether the update needs the gradients of the first pass as well."""

    needs_gradient = True
    """Whether the perturbation needs a gradient, and so a pass of its own."""

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., torch.optim.Optimizer],
        defaults: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(params, {**defaults, **kwargs})
        for group in self.param_groups:
            if not group["rho"] >= 0:
                raise ValueError(f"rho: expected a radius >= 0, got {group['rho']}; 0.05 is common.")
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.defaults = {**self.base_optimizer.defaults, **self.defaults}
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        self._saved: dict[Tensor, Tensor] = {}
        self._first: dict[Tensor, Tensor] = {}
        self._moved: list[Tensor] = []
        self._between = False  # after first_step, before second_step
        self._overflowed = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Options and momentum of another run; weights are the model's own affair."""
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups, self.base_optimizer.state = self.param_groups, self.state

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, scaled: bool = False) -> None:
        """Move to the perturbed weights.

        Args:
            zero_grad: Remove the gradients, for the second pass.
            scaled: The loss was scaled by a `GradScaler`, so that infinite gradients are no error; the step is skipped.

        Raises:
            FloatingPointError: The perturbation is not finite; the message names the parameter.
            RuntimeError: There is no gradient at all.
        """
        self.restore()
        moving = [(group, param) for group in self.param_groups for param in group["params"] if self._moves(param)]
        if not moving:
            raise RuntimeError(
                f"{type(self).__name__}: expected {self._checked}s to step along, got none in any parameter; call "
                "loss.backward() first."
            )
        self._between = True
        sound = self._perturb(moving)
        if not sound:
            self.restore()
            if not scaled:
                params = [param for _, param in moving]
                check_finite(
                    [self._direction(param) for param in params],
                    partial(name_of, self.param_groups, params),
                    self._checked,
                )
                check_finite(params, partial(name_of, self.param_groups, params), "weight")
                raise FloatingPointError(
                    f"{self._checked}: expected a norm that float32 holds, got one beyond; the weights are untouched."
                )
            self._between = self._overflowed = True
        if self.keeps_first and sound:
            self._first = {param: owned(param.grad) for _, param in moving}
        if zero_grad or self.keeps_first:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """From the weights of before `first_step`, take the step of the base with the gradients found since.

        Raises:
            RuntimeError: There was no `first_step`.
            FloatingPointError: A gradient is not finite; the message names the parameter.
        """
        if not self._between:
            raise RuntimeError(
                f"{type(self).__name__}: expected first_step() before this step, got none since the last one; call "
                "first_step(), compute the gradients again, and then step."
            )
        found_inf = getattr(self, "found_inf", None)  # set while a GradScaler steps
        stepping = [(group, param) for group in self.param_groups for param in group["params"] if self._steps(param)]
        if self._overflowed or (found_inf is not None and bool(found_inf)):
            self.restore()
        else:
            try:
                if found_inf is None:
                    params = [param for _, param in stepping if param.grad is not None]
                    check_finite(
                        [or_zeros(param.grad, param) for param in params], partial(name_of, self.param_groups, params)
                    )
                else:
                    self._unscale(stepping)
            except BaseException:
                self.restore()
                raise
            self._update(stepping)
        self._between = self._overflowed = False
        # What a learning-rate scheduler looks at, on whichever of the two it was made for.
        self._opt_called = self.base_optimizer._opt_called = True  # type: ignore[attr-defined]
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both halves around a closure that computes loss and gradients; without one, the second half.

        Returns:
            What the closure returned.
        """
        if closure is None:
            return self.second_step()
        self.first_step(zero_grad=True)
        try:
            with torch.enable_grad():
                result = closure()
        except BaseException:
            self.restore()
            raise
        self.second_step()
        return result

    @torch.no_grad()
    def restore(self) -> None:
        """Back to the weights of before `first_step`, without a step; nothing where there was none."""
        if self._moved:
            torch._foreach_copy_(self._moved, [self._saved[param] for param in self._moved])
        self._moved, self._first = [], {}
        self._between = self._overflowed = False

    # What the subclasses decide.

    _checked = "gradient"

    def _mode(self, group: Group) -> Mode:
        return "sam"

    def _moves(self, param: Tensor) -> bool:
        return param.grad is not None

    def _direction(self, param: Tensor) -> Tensor:
        assert param.grad is not None
        return param.grad

    def _known_norm(self) -> Tensor | None:
        return None

    def _reference(self, param: Tensor) -> Tensor | None:
        return None

    def _share_of_second(self, firsts: list[Tensor], seconds: list[Tensor]) -> float:
        """The alpha of `sharp_step_`; may rescale `seconds` in place."""
        return 1.0

    def _stepped(self, params: list[Tensor], distance: Tensor | None) -> None:
        """Called after an update of `params`, with their new distance to the references where it is known."""

    # The two halves.

    def _perturb(self, moving: list[tuple[Group, Tensor]]) -> bool:
        """Move the parameters, and tell whether all norms were finite."""
        calls = []
        for key, params in grouped(((group["rho"], self._mode(group), *kind(x)), x) for group, x in moving).items():
            dirs = [with_rows(laid_out_like(self._direction(param), param)) for param in params]
            saved = [with_rows(self._buffer(param)) for param in params]
            calls.append((key, [with_rows(param.detach()) for param in params], dirs, saved))
        norm = self._known_norm()
        if norm is None and self.scope == "global" and len(calls) > 1:
            norm = euclidean([norm_along(mode, params, dirs) for (_, mode, *_), params, dirs, _ in calls])
        norms = [
            ops.perturb_(
                *lists, rho=rho, mode=mode, scope=self.scope, norm=None if norm is None else norm.to(lists[0][0].device)
            )
            for (rho, mode, *_), *lists in calls
        ]
        self._moved = [param for _, param in moving]
        return not norms or bool(torch.cat([x.reshape(-1).to(norms[0].device) for x in norms]).isfinite().all())

    def _update(self, stepping: list[tuple[Group, Tensor]]) -> None:
        params = [param for _, param in stepping]
        seconds = [or_zeros(param.grad, param) for param in params]
        firsts = [or_zeros(self._first.get(param), param) for param in params] if self.keeps_first else []
        alpha = self._share_of_second(firsts, seconds)
        if type(self.base_optimizer) is torch.optim.SGD and not any(x["differentiable"] for x in self.param_groups):
            moved = set(self._moved)
            saved = [self._saved[param] if param in moved else param.detach() for param in params]
            self._moved = list(moved - set(params))
            self.restore()  # what moved and got no gradient since
            references = [self._reference(param) for param in params]
            mixed = firsts if alpha != 1 else None
            self._stepped(params, sgd_step(self.state, stepping, saved, seconds, mixed, references, alpha=alpha))
        else:
            if alpha != 1:
                torch._foreach_lerp_(seconds, firsts, 1 - alpha)
            for param, gradient in zip(params, seconds, strict=True):
                param.grad = gradient
            self.restore()
            self.base_optimizer.step()
            self._stepped(params, None)
        self._moved, self._first = [], {}

    def _steps(self, param: Tensor) -> bool:
        return param.grad is not None or param in self._first

    def _unscale(self, stepping: list[tuple[Group, Tensor]]) -> None:
        scale = getattr(self, "grad_scale", None)
        if scale is None and self.keeps_first:
            raise RuntimeError(
                f"{type(self).__name__}: expected gradients that are still scaled, since those of the first pass are, "
                "got ones after scaler.unscale_(optimizer); leave that call out."
            )
        if scale is not None:
            gradients = [param.grad for _, param in stepping if param.grad is not None] + list(self._first.values())
            for group in grouped((kind(gradient), gradient) for gradient in gradients).values():
                torch._foreach_mul_(group, (1 / scale).to(group[0].device))

    def _buffer(self, param: Tensor) -> Tensor:
        if param not in self._saved:
            self._saved[param] = torch.empty_like(param.detach())
        return self._saved[param]
