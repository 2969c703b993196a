"""Skip connections of any network, y = F(x) + S(x), found by tracing a forward pass and not by names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

ADDITIONS = {"add", "add_"}
"""What torch calls the functions behind +, += and methods of sums."""

LAYERS = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "bilinear"),
    *("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "embedding", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    *("scaled_dot_product_attention", "multi_head_attention_forward"),
}
"""Functions that make a branch deeper, by name."""

WEIGHTED: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, F.linear), ("input", "weight", "bias")),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias"),
}
"""Functions whose output grows with weight and bias, and the names of their first arguments."""


@dataclass(frozen=True)
class Skip:
    """A skip, by its place in the network.

    Attributes:
        module: The innermost module that holds the sum and runs once in a pass.
        addition: Number of the sum among all sums of activations that this module makes in a pass.
        additions: How many these are.
        operand: Which operand of the sum is the skip, 0 or 1.
        parameters: Weight and bias of the layer that makes the skip, where they and the skip serve nothing else.
    """

    module: str
    addition: int
    additions: int
    operand: int
    parameters: tuple[str, ...] = ()


def find_skips(model: nn.Module, run: Callable[[], Any]) -> list[Skip]:
    """The skips of a network in the order of the pass that `run` makes.

    Of a sum of two activations, the skip is the operand with fewer layers before it, if it lies at most one layer
    behind something that the other operand was made of: the input of a block, or a projection of it. What TorchScript,
    or a single function of torch, does inside is not seen.
    """
    trace, handles = _Trace(model), []
    try:
        for name, module in model.named_modules():
            # Around all other hooks, as the call of the module is.
            handles.append(module.register_forward_pre_hook(partial(trace.enter, name), prepend=True))
            handles.append(module.register_forward_hook(trace.leave))
        with torch.no_grad(), trace:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return trace.skips()


def is_sum(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call adds two floating-point tensors of one shape, of two dimensions or more."""
    if _name(func) not in ADDITIONS:
        return False
    first, second, *_ = *args, *kwargs.values(), None
    return (
        isinstance(first, Tensor)
        and isinstance(second, Tensor)
        and first.shape == second.shape
        and first.ndim > 1
        and first.is_floating_point()
        and second.is_floating_point()
    )


@dataclass(eq=False)
class _Origin:
    """What a tensor was made of: sets of activations, as bits. A constant is made of none.

    Attributes:
        made_of: All of them, with itself.
        near: Those that no layer lies behind, and those that at most one lies behind.
        depth: Layers on the longest way from the input.
        parameters: Weight and bias of the layer whose output it is.
        uses: Calls that make another tensor of it.
    """

    made_of: int = 0
    near: tuple[int, int] = (0, 0)
    depth: int = 0
    parameters: tuple[str, ...] = ()
    uses: int = 0


class _Trace(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.origins: Any = WeakTensorKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self.origins[tensor] = _Origin()
        self.activations = 0
        self.parameter_uses: Counter[str] = Counter()
        self.open: list[tuple[str, int]] = []
        self.calls: Counter[str] = Counter()
        self.additions: Counter[str] = Counter()
        self.found: list[tuple[list[tuple[str, int]], int, _Origin]] = []

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        self.calls[name] += 1
        self.open.append((name, self.additions[name]))

    def leave(self, *_: Any) -> None:
        self.open.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs := kwargs or {}))
        made, given = list(_tensors(output)), list(_tensors((args, kwargs)))
        if made:
            origins = [self._origin(tensor) for tensor in given]
            for origin in origins:
                origin.uses += 1
            self.parameter_uses.update(self.names[id(tensor)] for tensor in given if id(tensor) in self.names)
            if is_sum(func, args, kwargs):
                self._sum(origins[0], origins[1])
            active = [origin for origin in origins if origin.made_of]
            origin = self._activation(active, layer=_name(func) in LAYERS) if active else _Origin()
            origin.parameters = self._parameters(func, args, kwargs)
            for tensor in made:
                self.origins[tensor] = origin
        return output

    def _origin(self, tensor: Tensor) -> _Origin:
        if tensor not in self.origins:  # it came from outside: an input
            self.origins[tensor] = self._activation([], layer=False)
        return self.origins[tensor]

    def _activation(self, origins: list[_Origin], *, layer: bool) -> _Origin:
        made_of = at_none = at_one = 1 << self.activations
        self.activations += 1
        for origin in origins:
            made_of |= origin.made_of
            at_none |= 0 if layer else origin.near[0]
            at_one |= origin.near[0] if layer else origin.near[1]
        return _Origin(made_of, (at_none, at_one), max((origin.depth for origin in origins), default=0) + layer)

    def _parameters(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        if func not in WEIGHTED:
            return ()
        named = {**dict(zip(WEIGHTED[func], args, strict=False)), **kwargs}
        parts = [part for part in (named.get("weight"), named.get("bias")) if part is not None]
        names = [self.names.get(id(part)) for part in parts]
        return () if named.get("weight") is None or None in names else tuple(map(str, names))

    def _sum(self, first: _Origin, second: _Origin) -> None:
        places = [(name, self.additions[name] - before) for name, before in self.open]
        self.additions.update({name for name, _ in self.open})
        operand = int(second.depth < first.depth)
        skip, branch = (second, first) if operand else (first, second)
        if skip.depth < branch.depth and skip.near[1] & branch.made_of:
            self.found.append((places, operand, skip))

    def skips(self) -> list[Skip]:
        skips = []
        for places, operand, origin in self.found:
            own = origin.uses == 1 and all(self.parameter_uses[part] == 1 for part in origin.parameters)
            parameters = origin.parameters if own else ()
            once = [(name, addition) for name, addition in places if self.calls[name] == 1]
            skips += [Skip(name, addition, self.additions[name], operand, parameters) for name, addition in once[-1:]]
        return skips


def _name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", "")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
