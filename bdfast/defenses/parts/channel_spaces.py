"""Which weights share channels: what a layer's outputs are to the layers that read them, found by following a pass.

A *channel space* is a set of channels in one order: all layers that write to it, and all that read from it, agree on
that order. Layers whose outputs are added write to one space; activations, normalisation and pooling leave the space of
their input. What is not understood (concatenation, attention, operations of the user's) fixes the order of whatever
goes into it, so that its spaces count as none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bdfast.neurons import NeuronIndex
from bdfast.neurons.index import NeuronLayer


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CONVOLUTIONS = _words("conv1d conv2d conv3d")
TRANSPOSED = _words("conv_transpose1d conv_transpose2d conv_transpose3d")
POSITIONWISE = _words(
    "relu relu6 leaky_relu rrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid logsigmoid tanh "
    "softplus softsign softmax log_softmax dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout "
    "clamp clamp_min clamp_max abs neg square sqrt exp clone contiguous detach to type float double half bfloat16 "
    "layer_norm rms_norm normalize"
)
OF_DIMENSION_1 = _words("batch_norm instance_norm prelu")
BINARY = _words("add iadd radd sub isub rsub mul imul rmul div truediv itruediv maximum minimum")
RESHAPES = _words("flatten reshape view squeeze unsqueeze expand")
POOLS = {
    f"{kind}_pool{positions}d": positions
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp")
    for positions in (1, 2, 3)
}


@dataclass(frozen=True)
class Link:
    """A weight, and the channel spaces between which it stands; None for channels in the order that they have.

    Attributes:
        layer: The weight and how to view it as rows.
        sources: Space of its inputs, dimension 1 of its rows.
        each: How many consecutive inputs belong to a channel: positions, where a linear layer reads a flattened map.
        results: Space of its outputs.
        owns: Whether its rows define channels of `results`; those of a depthwise convolution follow them.
    """

    layer: NeuronLayer
    sources: int | None
    each: int
    results: int | None
    owns: bool = True


class Traced(NamedTuple):
    """The links in order of execution, and the names of the weights whose outputs the network returns."""

    links: list[Link]
    returned: set[str]


def traced(model: nn.Module, index: NeuronIndex, forward: Callable[[], Tensor], *known: Tensor) -> Traced:
    """Follow a forward pass.

    Args:
        model: The network, in the mode in which it is called.
        index: The weights to follow, of convolutions and linear layers; the others are not understood.
        forward: Calls the network and returns the logits.
        known: The tensors that `forward` starts from.
    """
    tracer = _Tracer(model, index, known)
    with torch.no_grad(), tracer:
        logits = forward()
    return tracer.ended(logits)


class _Place(NamedTuple):
    """Where a tensor has its channels: `each` consecutive elements for each one, in dimension `axis`."""

    space: int
    axis: int
    each: int = 1


class _Tracer(TorchFunctionMode):
    """Sees every operation on tensors that Python calls, and keeps the tensors, so that ids stay theirs."""

    def __init__(self, model: nn.Module, index: NeuronIndex, known: Sequence[Tensor]) -> None:
        super().__init__()
        named = dict(model.named_parameters(remove_duplicate=False))
        self._layers = {id(named[layer.parameter]): layer for layer in index.layers}
        constants = [*named.values(), *model.buffers()]
        self._constants = {id(x) for x in constants}
        self._kept = [*constants, *known]
        self._known = {id(x) for x in self._kept}
        self._places: dict[int, _Place] = {}
        self._links: dict[str, Link] = {}
        self._parents: list[int] = []
        self._fixed: set[int] = set()
        self._used_otherwise: set[str] = set()
        self._understood = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, then note where its result has its channels."""
        kwargs = kwargs or {}
        shapes = [x.shape for x in args if isinstance(x, Tensor)]
        out = func(*args, **kwargs)
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(out))
        if not outputs and isinstance(out, bool | int | torch.Size | torch.dtype | torch.device):
            return out
        # A tensor from outside of what Python calls, such as compiled code: anything may have gone into it.
        self._understood &= all(id(x) in self._known for x in inputs)
        self._kept += outputs
        self._known |= {id(x) for x in outputs}
        if all(id(x) in self._constants for x in inputs):
            self._constants |= {id(x) for x in outputs}
        elif any(id(x) in self._constants for x in outputs or inputs[:1]):  # written to, perhaps through a view
            self._understood = False
        place, read = None, inputs
        if isinstance(out, Tensor) and "out" not in kwargs and shapes:
            place, followed = self._followed(getattr(func, "__name__", "").strip("_"), args, kwargs, shapes[0], out)
            read = [x for x in inputs if all(x is not other for other in followed)]
        for x in read:
            self._fix(self._places.get(id(x)))
            if id(x) in self._layers:
                self._used_otherwise.add(self._layers[id(x)].parameter)
        if place is not None:
            self._places[id(out)] = place
        return out

    def ended(self, logits: Tensor) -> Traced:
        """What was found, once the pass is over."""
        place = self._places.get(id(logits))
        self._fix(place)
        for name in self._used_otherwise & self._links.keys():
            for space in (self._links[name].sources, self._links[name].results):
                if space is not None:
                    self._fixed.add(self._root(space))
        understood = self._understood and id(logits) in self._known
        returned = set()
        links = []
        for name, link in self._links.items():
            roots = [None if space is None else self._root(space) for space in (link.sources, link.results)]
            if place is not None and link.owns and roots[1] == self._root(place.space):
                returned.add(name)
            free = [root if understood and root not in self._fixed else None for root in roots]
            links.append(Link(link.layer, free[0], link.each, free[1], link.owns))
        return Traced(links, returned)

    def _followed(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size, out: Tensor
    ) -> tuple[_Place | None, list[Tensor]]:
        """Where the result has its channels, None for unknown; and the inputs that this takes care of."""
        x = args[0]
        if name in CONVOLUTIONS or name in TRANSPOSED or name == "linear":
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if id(weight) in self._layers and isinstance(x, Tensor):
                return self._linked(name, x, weight, out), [x, weight]
            return None, []
        if name in BINARY and len(args) > 1:
            return self._merged(args[0], args[1], out)
        place = self._places.get(id(x))
        if place is None:
            return None, []
        moved = _moved(name, place, args, kwargs, shape, out)
        return (None, []) if moved is None else (moved, [x])

    def _linked(self, name: str, x: Tensor, weight: Tensor, out: Tensor) -> _Place | None:
        layer, place = self._layers[id(weight)], self._places.get(id(x))
        axis = x.ndim - 1 if name == "linear" else 1
        if place is not None and (place.axis != axis or (name != "linear" and x.ndim != weight.ndim)):
            self._fix(place)
            place = None
        groups = 1
        if name != "linear":
            groups = out.shape[1] // weight.shape[1] if name in TRANSPOSED else x.shape[1] // weight.shape[1]
        alone = name != "linear" and x.ndim != weight.ndim  # one image without a batch dimension
        if groups == 1 and not alone:
            source, each = (None, 1) if place is None else (place.space, place.each)
            link = Link(layer, source, each, self._new())
        elif name in CONVOLUTIONS and groups == len(weight) == x.shape[1] and place is not None and place.each == 1:
            link = Link(layer, None, 1, place.space, owns=False)
        else:
            self._fix(place)
            self._used_otherwise.add(layer.parameter)
            return None
        before = self._links.setdefault(layer.parameter, link)
        if before is not link:  # a weight that is used again
            self._join(before.sources, link.sources, alike=before.each == link.each)
            self._join(before.results, link.results, alike=before.owns == link.owns)
        assert link.results is not None
        return _Place(link.results, axis if name != "linear" else out.ndim - 1)

    def _merged(self, first: Any, second: Any, out: Tensor) -> tuple[_Place | None, list[Tensor]]:
        """A sum, a product and the like: both have the same channels, or one does not tell channels apart."""
        places = [self._places.get(id(x)) if isinstance(x, Tensor) else None for x in (first, second)]
        if places[0] is not None and places[1] is not None:
            same = first.ndim == second.ndim and places[0][1:] == places[1][1:]
            if not same or first.shape[places[0].axis] != second.shape[places[0].axis]:
                return None, []
            self._join(places[0].space, places[1].space)
            return places[0], [first, second]
        x, other, place = (first, second, places[0]) if places[0] is not None else (second, first, places[1])
        if place is None or out.shape != x.shape:
            return None, []
        if isinstance(other, Tensor) and id(other) not in self._constants:
            axis = other.ndim - (x.ndim - place.axis)
            if axis >= 0 and other.shape[axis] != 1:
                return None, []
        return place, [x]

    def _new(self) -> int:
        self._parents.append(len(self._parents))
        return len(self._parents) - 1

    def _root(self, space: int) -> int:
        while self._parents[space] != space:
            space = self._parents[space]
        return space

    def _fix(self, place: _Place | None) -> None:
        if place is not None:
            self._fixed.add(self._root(place.space))

    def _join(self, first: int | None, second: int | None, *, alike: bool = True) -> None:
        roots = [self._root(space) for space in (first, second) if space is not None]
        if len(roots) < 2 or not alike or self._fixed.intersection(roots):
            self._fixed.update(roots)
        if len(roots) == 2:
            self._parents[roots[1]] = roots[0]


def _moved(
    name: str, place: _Place, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: torch.Size, out: Tensor
) -> _Place | None:
    """Where the result of an operation on one tensor of `shape` has its channels."""
    axis, dims = place.axis, len(shape)
    if name in POSITIONWISE or (name in OF_DIMENSION_1 and axis == 1):
        return place if out.shape == shape else None
    if name in RESHAPES:
        return _reshaped(place, shape, out)
    if name in POOLS or name == "interpolate":
        positions = POOLS.get(name, dims - 2)
        return place if axis == 1 and dims == positions + 2 and out.shape[:2] == shape[:2] else None
    if len(args) < 2 and "dim" not in kwargs:
        return None
    if name == "pad":
        return place if axis == 1 and out.shape[:2] == shape[:2] and len(args[1]) <= 2 * (dims - 2) else None
    if name in ("mean", "sum", "amax"):
        given = args[1] if len(args) > 1 else kwargs["dim"]
        reduced = {dim % dims for dim in ([given] if isinstance(given, int) else given or range(dims))}
        if axis in reduced:
            return None
        return place if out.ndim == dims else place._replace(axis=axis - sum(dim < axis for dim in reduced))
    if name == "permute":
        order = [dim % dims for dim in (args[1] if isinstance(args[1], Sequence) else args[1:])]
        return place._replace(axis=order.index(axis))
    if name in ("transpose", "swapaxes") and len(args) > 2:
        pair = [dim % dims for dim in args[1:3]]
        return place._replace(axis=pair[1 - pair.index(axis)] if axis in pair else axis)
    return None


def _reshaped(place: _Place, shape: torch.Size, out: Tensor) -> _Place | None:
    if place.axis == 1 and out.shape[:2] == shape[:2] and min(shape[:2]) > 1:
        return place
    if place.axis == 1 and out.ndim == 2 and len(out) == shape[0] and out.numel() == math.prod(shape):
        return place._replace(each=place.each * math.prod(shape[2:]))
    if place.axis == len(shape) - 1 and out.shape[-1] == shape[-1] > 1 and place.axis > 1:
        return place._replace(axis=out.ndim - 1)
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
