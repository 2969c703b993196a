"""An optimizer around a base optimizer: one list of groups, one state and one set of hooks for both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch

Group = dict[str, Any]
Method = TypeVar("Method", bound=Callable[..., Any])


def restoring(method: Method) -> Method:
    """Make a method of an optimizer call `restore` before it passes on any error, Ctrl-C included."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        grad_mode = None
        try:
            grad_mode = torch.is_grad_enabled()
            return method(self, *args, **kwargs)
        except BaseException:
            if grad_mode is not None:
                torch.set_grad_enabled(grad_mode)
            # A GradScaler sets these, and removes them only after a step without error.
            for name in ("found_inf", "grad_scale"):
                self.__dict__.pop(name, None)
            self.restore()
            raise

    return cast(Method, call)


class AroundBase(torch.optim.Optimizer):
    """Can be used wherever the base can; only the step is another.

    A copy or pickle continues like the original, but has none of its hooks, like those of torch's optimizers.

    Args:
        params: Parameters, named parameters or groups.
        base_optimizer: Class of the base.
        defaults: Options of the subclass, which groups may set by themselves.
        **kwargs: Options of the base.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., torch.optim.Optimizer],
        defaults: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(params, {**defaults, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.defaults = {**self.base_optimizer.defaults, **self.defaults}
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        self._joined: dict[str, Any] = {}
        self._join()

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only the groups and the state. Hooks are left out here, and methods that were replaced on this
        # object, as schedulers replace `step`: both refer to this object.
        own = {name: x for name, x in self.__dict__.items() if not callable(getattr(type(self), name, None))}
        return {name: x for name, x in own.items() if not name.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join()

    def _join(self) -> None:
        """Share groups and state again, if one of the two got new ones, for example by `load_state_dict`."""
        base, before = self.base_optimizer, self._joined.get("param_groups", [])
        for name in ("param_groups", "state"):
            changed = base if getattr(self, name) is self._joined.get(name) else self
            self._joined[name] = getattr(changed, name)
            setattr(self, name, self._joined[name])
            setattr(base, name, self._joined[name])
        if self.param_groups is not before:
            # A state dict of the base has no options of ours, such as rho.
            for group, options in zip(self.param_groups, before, strict=False):
                for name in self.defaults.keys() - group.keys():
                    group[name] = options.get(name, self.defaults[name])
        base._optimizer_step_pre_hooks = self._optimizer_step_pre_hooks
        base._optimizer_step_post_hooks = self._optimizer_step_post_hooks
