"""Suppressed skip connections: y = F(x) + gamma * S(x)."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bdfast.defenses.parts.skips import Skip, is_sum


class Scaled(NamedTuple):
    """A skip that is scaled in a module; see `Skip`."""

    addition: int
    additions: int
    operand: int
    gamma: float


def suppress_skip(model: nn.Module, skip: Skip, gamma: float) -> None:
    """Scale a skip for good, in place: in the weights, where they can express it, else by a change of its module.

    A changed module keeps its parameters and their names, and may be copied, pickled and run in several threads. A
    state dict does not hold the change: `set_scaled_sums(network, scaled_sums(model))` makes it in another network that
    loads the state dict.
    """
    if skip.parameters:
        with torch.no_grad():
            for name in skip.parameters:
                model.get_parameter(name).mul_(gamma)
    else:
        _scale(model, skip, gamma)


@contextmanager
def suppressed(model: nn.Module, skip: Skip, gamma: float) -> Iterator[None]:
    """Inside, a skip is scaled; no weight changes."""
    before = scaled_sums(model)
    try:
        _scale(model, skip, gamma)
        yield
    finally:
        set_scaled_sums(model, before)


def scaled_sums(model: nn.Module) -> dict[str, list[Scaled]]:
    """The skips that are scaled by a change of modules, by the names of these; JSON can hold it."""
    return {name: list(module.scaled_sums) for name, module in model.named_modules() if isinstance(module, Scaling)}


def set_scaled_sums(model: nn.Module, sums: Mapping[str, Sequence[Sequence[Any]]]) -> None:
    """Make these the skips that are scaled by a change of modules, in place.

    Args:
        model: A network of the architecture that `sums` was read from.
        sums: From `scaled_sums`, also after a way through JSON; {} ends all scaling.

    Raises:
        ValueError: The network has no module of such a name.
    """
    modules = dict(model.named_modules())
    for name in sums:
        if name not in modules:
            raise ValueError(
                f"sums: expected names of modules of the network, a {type(model).__name__}, got {name!r}; pass a "
                "network of the same architecture."
            )
    for name, module in modules.items():
        scaled = tuple(Scaled(*entry) for entry in sums.get(name, ()))
        base: Any = module.unscaled_class if isinstance(module, Scaling) else type(module)
        if scaled:
            module.__class__ = _scaling(base)
            module.scaled_sums = scaled
        elif isinstance(module, Scaling):
            module.__class__ = base
            del module.scaled_sums


def _scale(model: nn.Module, skip: Skip, gamma: float) -> None:
    sums = scaled_sums(model)
    scaled = Scaled(skip.addition, skip.additions, skip.operand, gamma)
    set_scaled_sums(model, {**sums, skip.module: [*sums.get(skip.module, ()), scaled]})


class Scaling(nn.Module):
    """What the class of a module becomes a subclass of whose skips are scaled.

    A subclass and not a hook: a hook that changes the mode of a thread would have to end it after every exception. Not
    a module around the module: names would change.

    Attributes:
        unscaled_class: What its class was.
        scaled_sums: Which of its sums are scaled.
    """

    # Long names, as those of the module's own attributes are not known.
    unscaled_class: ClassVar[type[nn.Module]]
    scaled_sums: tuple[Scaled, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module.

        Raises:
            RuntimeError: The call makes another number of sums than when the skips were found, so that it is not known
                which are meant.
        """
        with _ScalingMode(self.scaled_sums) as mode:
            output = super().__call__(*args, **kwargs)
        expected = self.scaled_sums[0].additions
        if mode.seen != expected:
            raise RuntimeError(
                f"model: expected {expected} sum(s) of activations in a call of a {self.unscaled_class.__name__}, one "
                f"of which has a suppressed skip, got {mode.seen}; use a network that makes the same sums in every "
                "pass, and no TorchScript."
            )
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle knows only classes that stand in a file."""
        of_object: Any = super().__reduce_ex__(max(2, protocol))
        return (_empty, (self.unscaled_class,), *of_object[2:])


@functools.cache
def _scaling(base: Any) -> Any:
    inside = {"unscaled_class": base}
    return types.new_class(f"Suppressed{base.__name__}", (Scaling, base), exec_body=lambda names: names.update(inside))


def _empty(base: Any) -> Any:
    cls = _scaling(base)
    return cls.__new__(cls)


class _ScalingMode(TorchFunctionMode):
    """Scales the skips of one call of a module; modes are those of a thread."""

    def __init__(self, scaled: tuple[Scaled, ...]) -> None:
        super().__init__()
        self.scaled, self.seen = scaled, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_sum(func, args, kwargs):
            for scaled in self.scaled:
                if scaled.addition == self.seen:
                    args, kwargs = _with_scaled(func, args, kwargs, scaled)
            self.seen += 1
        return func(*args, **kwargs)


def _with_scaled(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], scaled: Scaled
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    place, names = scaled.operand, list(kwargs)
    skip = args[place] if place < len(args) else kwargs[names[place - len(args)]]
    # The sum is written into the first operand of `+=`.
    skip = skip.mul_(scaled.gamma) if place == 0 and func.__name__ == "add_" else skip * scaled.gamma
    if place < len(args):
        return (*args[:place], skip, *args[place + 1 :]), kwargs
    return args, {**kwargs, names[place - len(args)]: skip}
