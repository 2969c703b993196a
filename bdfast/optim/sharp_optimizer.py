"""What SAM, GradientNorm and PAM share: perturb the weights, take a gradient there, restore them and step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bdfast.ops import Mode, Scope
from bdfast.ops.finite import check_finite
from bdfast.ops.lists import grouped, kind, lay_out, name_of, owned
from bdfast.optim.around_base import AroundBase, Group, restoring
from bdfast.optim.base_step import Snapshot, take_step
from bdfast.optim.fused_sgd import FusedSGD
from bdfast.optim.saved_weights import Move, SavedWeights


class SharpOptimizer(AroundBase):
    """An optimizer that takes its gradient at perturbed weights; `SAM`, `GradientNorm` and `PAM` say which.

    The update is that of a base optimizer. With `torch.optim.SGD` as the base, restoring the weights, mixing two
    gradients, weight decay, momentum and update are one pass over memory (`bdfast.ops.sharp_step_`). The weights are
    restored bit for bit, from a copy that is made once and kept. Any other base is stepped as it is, and its state is
    copied before each step, to restore it if the step fails.

    Parameters that are frozen, or have no gradient, do not change. A gradient that is NaN or infinite stops the step
    with an error that names the parameter (its place in the groups, where the optimizer was not made from
    `model.named_parameters()`). After any error the weights, the momentum and all other state are those of before the
    step, or those of the finished step if the error came after the update. There is one exception: where momentum
    buffers were replaced by ones that overlap, that is found after the momentum of earlier groups has advanced. The
    hooks of a step are called once, by `step` or `second_step`. With a `GradScaler`, give `scaled=True` to
    `first_step`, scale both losses, and end with `scaler.step(optimizer)`, which skips steps whose gradient is not
    finite.

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
        super().__init__(params, base_optimizer, defaults, **kwargs)
        self._weights = SavedWeights()
        self._first: dict[Tensor, Tensor] = {}
        self._between = False  # after first_step, before second_step
        self._overflowed = False

    def add_param_group(self, param_group: Group) -> None:
        """As of any optimizer; the group may have its own options, such as `rho`."""
        if isinstance(param_group, dict):
            rho = param_group.get("rho", self.defaults["rho"])
            if not rho >= 0:
                raise ValueError(f"rho: expected a radius >= 0, got {rho}; 0.05 is common.")
        super().add_param_group(param_group)

    @restoring
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
        self._join()
        moving = [(group, param) for group in self.param_groups for param in group["params"] if self._moves(param)]
        if not moving:
            needed = "gradients to step along" if self.needs_gradient else "a parameter with requires_grad=True"
            advice = "call loss.backward() first" if self.needs_gradient else "unfreeze what is to be trained"
            raise RuntimeError(f"{type(self).__name__}: expected {needed}, got none in any parameter; {advice}.")
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
        elif self.keeps_first:
            self._first = {param: owned(param.grad) for _, param in moving}
        if zero_grad or self.keeps_first:
            self.zero_grad()
        self._between, self._overflowed = True, not sound

    @restoring
    def second_step(self, zero_grad: bool = False) -> None:
        """From the weights of before `first_step`, take the step of the base with the gradients found since.

        Raises:
            RuntimeError: There was no `first_step`.
            FloatingPointError: A gradient is not finite; the message names the parameter.
        """
        self.step()
        if zero_grad:
            self.zero_grad()

    @restoring
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both halves around a closure that computes loss and gradients; without one, the second half.

        Returns:
            What the closure returned.
        """
        return self._hooked_step() if closure is None else self._hooked_step(closure)

    # The mark keeps torch from calling the hooks outside of `restoring`, where their errors would restore nothing.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            self.first_step(zero_grad=True)
            with torch.enable_grad():
                result = closure()
        self._finish()
        return result

    _hooked_step = torch.optim.Optimizer.profile_hook_step(_step)

    def restore(self) -> None:
        """Restore the weights of before `first_step`, without a step; does nothing if there was none."""
        if self._weights.put_back():
            self._restored()
        self._weights.forget()
        self._first = {}
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
        """Asked first in a step, before any direction."""
        return None

    def _restored(self) -> None:
        """Called when the weights are those of before `first_step` again."""

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
        norm = self._known_norm()
        groups = grouped(((group["rho"], self._mode(group), *kind(x)), x) for group, x in moving)
        moves = [
            Move(rho, mode, params, [self._direction(param) for param in params])
            for (rho, mode, *_), params in groups.items()
        ]
        norms = self._weights.perturb(moves, scope=self.scope, norm=norm)
        return bool(torch.cat([x.reshape(-1).to(norms[0].device) for x in norms]).isfinite().all())

    @torch.no_grad()
    def _finish(self) -> None:
        self._join()
        if not self._between:
            if self._makes_state():
                return
            raise RuntimeError(
                f"{type(self).__name__}: expected first_step() before this step, got none since the last one; call "
                "first_step(), compute the gradients again, and then step."
            )
        found_inf = getattr(self, "found_inf", None)  # set while a GradScaler steps
        stepping = [(group, param) for group in self.param_groups for param in group["params"] if self._steps(param)]
        if not self._overflowed and not (found_inf is not None and bool(found_inf)):
            if found_inf is None:
                params = [param for _, param in stepping if param.grad is not None]
                check_finite([param.grad for param in params], partial(name_of, self.param_groups, params))
            else:
                self._unscale(stepping)
            self._update(stepping)
        self.restore()
        # Learning-rate schedulers read this from the optimizer that they were given, one or the other.
        self._opt_called = self.base_optimizer._opt_called = True  # type: ignore[attr-defined]

    def _update(self, stepping: list[tuple[Group, Tensor]]) -> None:
        params = [param for _, param in stepping]
        moved = self._weights.moved
        left = []  # what moved and got no gradient since
        if [*map(id, moved)] != [*map(id, params)]:
            left = [*set(moved) - set(params)]
            self._weights.save([*set(params) - set(moved)])
        laid = self._weights.laid(params)
        seconds = lay_out([param.grad for param in params], laid.works)
        firsts = lay_out([self._first.get(param) for param in params], laid.works) if self.keeps_first else []
        alpha = self._share_of_second(firsts, seconds)
        # Emptying `moved` makes the step final: nothing is restored after that.
        distance = None
        if type(self.base_optimizer) is torch.optim.SGD and not any(x["differentiable"] for x in self.param_groups):
            references = [self._reference(param) for param in params]
            mixed = firsts if alpha != 1 else None
            step = FusedSGD(self.state, stepping, laid, seconds, mixed, references, alpha=alpha)
            self._weights.put_back(left)
            try:
                distance = step.take()
                self._weights.moved = []
            except BaseException:
                if step.begun():
                    step.finish()
                    self._weights.moved = []
                raise
        else:
            if alpha != 1:
                torch._foreach_lerp_(seconds, firsts, 1 - alpha)
            sparse = type(self.base_optimizer) is torch.optim.SparseAdam and alpha == 1  # it takes nothing else
            for param, gradient in zip(params, seconds, strict=True):
                param.grad = param.grad if sparse else gradient
            self._weights.put_back()
            with Snapshot(self.base_optimizer):
                take_step(self.base_optimizer)
                self._weights.moved = []
        self._stepped(params, distance)

    def _makes_state(self) -> bool:
        """Take the step of length zero with which `torch.distributed.checkpoint` has the state made, if this is it."""
        if self.state or not all(float(group.get("lr", 1)) == 0 for group in self.param_groups):
            return False
        distance = self._known_norm()
        with Snapshot(self.base_optimizer):
            take_step(self.base_optimizer)
        self._stepped([x for group in self.param_groups for x in group["params"] if self._moves(x)], distance)
        return True

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
            values = [x._values() if x.layout is torch.sparse_coo else x for x in gradients]
            for group in grouped((kind(x), x) for x in values).values():
                torch._foreach_mul_(group, (1 / scale).to(group[0].device))

    @property
    def _saved(self) -> dict[Tensor, Tensor]:
        """The copies of the weights; between the halves of a step, the weights of before it."""
        return self._weights.copies
