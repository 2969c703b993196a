"""An index of the neurons of a model: flat numbers, and the parameters and rows that hold them.

A *neuron* is one output unit. The rules are in `rules.py`, scores per neuron in `scores.py`.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bdfast.neurons.rules import Split, known_kinds, neuron_parameters, split_neurons
from bdfast.ops.lists import strides

Source: TypeAlias = nn.Module | Mapping[str, Tensor]

# The names of residual shortcuts in the CIFAR ResNets of the backdoor literature and in torchvision.
SHORTCUTS = ("*shortcut*", "*downsample*")


@dataclass(frozen=True)
class NeuronLayer:
    """One parameter that holds neurons, and their place among all neurons of an index.

    Attributes:
        parameter: Qualified name of the parameter, "layer1.0.conv1.weight".
        module: Qualified name of its module, "layer1.0.conv1"; empty if the model itself is that module.
        kind: "conv", "linear", "embedding", "attention", "norm", or the kind of a rule that was registered.
        start: Flat number of its first neuron.
        stop: Flat number after its last neuron.
        shape: Shape of the parameter.
        split: How to view the parameter as rows, see `rules.py`.
    """

    parameter: str
    module: str
    kind: str
    start: int
    stop: int
    shape: torch.Size
    split: Split = field(repr=False, compare=False)

    def __len__(self) -> int:
        return self.stop - self.start


class NeuronIndex:
    """The neurons of a model, numbered 0 to R - 1 in the order of its modules.

    The index holds names and shapes but no tensors, so it is valid for every model of the same architecture. A
    parameter that several modules share is counted once, under the name and kind of the first; frozen parameters
    count too. Quantised weights, and weights computed at each forward pass (weight_norm,
    parametrizations), are not neurons.

    Args:
        model: The module to index.
        kinds: Kinds to keep, one or several; by default all but "norm", the scales of normalisation layers.
        include: Glob patterns, one or several, for names of parameters or modules; only matching ones are kept.
        exclude: Glob patterns, one or several, for names of parameters or modules; matching ones are left out.

    Attributes:
        layers: The parameters that hold the neurons, in order.

    Raises:
        TypeError: `model` is not a module.
        ValueError: A kind is unknown, nothing is selected, or a selected parameter is lazy or on "meta".
    """

    layers: tuple[NeuronLayer, ...]

    def __init__(
        self,
        model: nn.Module,
        *,
        kinds: str | Iterable[str] | None = None,
        include: str | Iterable[str] = "*",
        exclude: str | Iterable[str] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                "NeuronIndex: model: expected a torch.nn.Module, whose module types say where the neurons are, got a "
                f"{type(model).__name__}; index the model, then pass state dicts to `rows`."
            )
        kinds = _checked_kinds(kinds)
        include, exclude = _words(include), _words(exclude)
        self.layers = tuple(_find(model, kinds, include, exclude))
        if not self.layers:
            raise ValueError(
                f"NeuronIndex: model: expected at least one neuron of kinds {kinds}, include={include}, "
                f"exclude={exclude}, got none in a {type(model).__name__}; widen the selection, or give its modules a "
                "rule with bdfast.register_neurons."
            )

    @classmethod
    def of(cls, layers: Iterable[NeuronLayer]) -> "NeuronIndex":
        """The index of these layers alone, numbered anew from 0."""
        index = cls.__new__(cls)
        numbered, start = [], 0
        for layer in layers:
            numbered.append(replace(layer, start=start, stop=start + len(layer)))
            start += len(layer)
        index.layers = tuple(numbered)
        return index

    @classmethod
    def in_scope(cls, model: nn.Module, scope: str = "auto", *, compat: str | None = None) -> "NeuronIndex":
        """The neurons that TSBD ranks (Lin et al., NeurIPS 2024), extended to networks of other kinds.

        Residual shortcuts are left out, by name: "shortcut" as in the published code, "downsample" as in
        torchvision.

        Args:
            model: The module to index.
            scope: "conv" is the published choice; any other kind is possible. "auto" means "conv", unless
                fewer than half of the conv, linear and attention parameters are convolutions (transformers,
                MLPs, ConvNeXt); then it means all three.
            compat: "official" leaves out "shortcut" alone, as the published code does: torchvision's ResNet-18 then
                has 4,800 neurons, not 3,904.

        Raises:
            ValueError: `scope` is unknown, or the model has no neurons in it.
        """
        if scope not in ("auto", *known_kinds()):
            raise ValueError(
                f"NeuronIndex.in_scope: scope: expected one of auto, {', '.join(known_kinds())}, got {scope!r}; choose "
                "one of these, or select by name with NeuronIndex(include=..., exclude=...)."
            )
        exclude = SHORTCUTS[:1] if compat else SHORTCUTS
        if scope != "auto":
            return cls(model, kinds=scope, exclude=exclude)
        index = cls(model, kinds=("conv", "linear", "attention"), exclude=exclude)
        # Count layers, not weights: the classifier of VGG has six times the weights of its convolutions.
        convolutions = sum(layer.kind == "conv" for layer in index.layers)
        return index if 2 * convolutions < len(index.layers) else cls(model, kinds="conv", exclude=exclude)

    def __len__(self) -> int:
        return self.layers[-1].stop

    def __repr__(self) -> str:
        return f"NeuronIndex({len(self)} neurons in {len(self.layers)} parameters)"

    def locate(self, neuron: int) -> tuple[NeuronLayer, int]:
        """The layer of the neuron with this flat number, and its row there."""
        layer = self.layers[bisect_right(self.layers, neuron, key=lambda layer: layer.stop)]
        return layer, neuron - layer.start

    def rows(self, source: Source) -> list[Tensor]:
        """Views of the parameters of `source` with neurons in dimension 0, in the order of this index.

        Args:
            source: The indexed model, another one of the same architecture, or its state dict.

        Returns:
            Detached tensors [rows, ...] that share memory with `source`; their rows in list order are neurons
            0 to R - 1. One per parameter, or one per group for a grouped transposed convolution.

        Raises:
            TypeError: `source` is neither a module nor a mapping from names to tensors.
            ValueError: A name is missing, a shape differs, or the tensors are lazy, on the meta device, of
                several dtypes or on several devices.
        """
        return aligned_rows(self.layers, {"source": source})[0]


def aligned_rows(layers: Sequence[NeuronLayer], sources: Mapping[str, Source]) -> list[list[Tensor]]:
    """`NeuronIndex.rows` of several sources, which must also agree on one device and one dtype.

    The ops need equal strides, so a tensor of a later source is copied if its memory format differs from that in the
    first source (channels last). Only the rows of the first source are guaranteed to share memory with it.

    Args:
        layers: The layers of an index.
        sources: From the name of the caller's argument, for errors, to a module or state dict.

    Raises:
        TypeError: A source is neither a module nor a mapping from names to tensors.
        ValueError: A name is missing, a shape differs, or the tensors are lazy, on the meta device, of several dtypes
            or on several devices.
    """
    result = []
    agreed: tuple[str, Tensor] | None = None
    formats: dict[str, Tensor] = {}
    for argument, source in sources.items():
        tensors = named_tensors(source, argument)
        rows: list[Tensor] = []
        for layer in layers:
            name = f"{argument}[{layer.parameter!r}]"
            tensor = tensors.get(layer.parameter)
            if not isinstance(tensor, Tensor):
                raise ValueError(
                    f"{name}: expected a tensor of shape {tuple(layer.shape)} as in the indexed model, got "
                    f"{'none' if tensor is None else f'a {type(tensor).__name__}'}; pass a model or state dict of the "
                    "same architecture, without wrappers that change the names (DataParallel, torch.compile)."
                )
            _check_has_data(name, tensor)
            if tensor.shape != layer.shape:
                raise ValueError(
                    f"{name}: expected shape {tuple(layer.shape)} as in the indexed model, got "
                    f"{tuple(tensor.shape)}; pass a model or state dict of the same architecture."
                )
            agreed = agreed or (name, tensor)
            if (tensor.device, tensor.dtype) != (agreed[1].device, agreed[1].dtype):
                raise ValueError(
                    f"{name}: expected {agreed[1].dtype} on {agreed[1].device} like {agreed[0]}, got {tensor.dtype} on "
                    f"{tensor.device}; bring both to one dtype and device with .to(...), or leave one out with "
                    "NeuronIndex(kinds=..., exclude=...)."
                )
            like = formats.setdefault(layer.parameter, tensor)
            if strides(tensor) != strides(like):
                tensor = torch.empty_like(like).copy_(tensor)
            rows += split_neurons(tensor.detach(), layer.split)
        result.append(rows)
    return result


def named_tensors(source: Source, argument: str) -> Mapping[str, Tensor]:
    """The parameters of a module under all their names, or the state dict itself."""
    if isinstance(source, nn.Module):
        return dict(source.named_parameters(remove_duplicate=False))
    if isinstance(source, Mapping):
        return source
    raise TypeError(
        f"{argument}: expected a torch.nn.Module or a state dict, got a {type(source).__name__}; pass the model, or "
        "what its state_dict() returns."
    )


def _find(
    model: nn.Module, kinds: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> Iterable[NeuronLayer]:
    seen: set[int] = set()
    start = 0
    for module_name, module in model.named_modules():
        for attribute, parameter, kind, split in neuron_parameters(module):
            name = f"{module_name}.{attribute}" if module_name else attribute
            # Before any selection: the name of a shared parameter must not depend on the selection.
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            names = (name, module_name)
            if kind not in kinds or not _matches(names, include) or _matches(names, exclude):
                continue
            _check_has_data(f"NeuronIndex: model[{name!r}]", parameter)
            rows = split_neurons(parameter.detach(), split)
            _check_views(name, parameter, rows)
            if parameter.numel():
                stop = start + sum(len(view) for view in rows)
                yield NeuronLayer(name, module_name, kind, start, stop, parameter.shape, split)
                start = stop


def _words(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _checked_kinds(kinds: str | Iterable[str] | None) -> tuple[str, ...]:
    known = known_kinds()
    if kinds is None:
        return tuple(kind for kind in known if kind != "norm")
    kinds = _words(kinds)
    for position, kind in enumerate(kinds):
        if kind not in known:
            raise ValueError(
                f"NeuronIndex: kinds[{position}]: expected one of {', '.join(known)}, got {kind!r}; choose one of "
                "these, or add a kind with bdfast.register_neurons."
            )
    return kinds


def _check_has_data(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ValueError(
            f"{name}: expected a parameter with a shape, got one that is not initialised; run one forward pass through "
            "the model first, so that its lazy modules take their sizes."
        )
    if tensor.is_meta:
        raise ValueError(
            f"{name}: expected a tensor with data, got one on the meta device; load the weights first, for example "
            "with load_state_dict(..., assign=True)."
        )


def _check_views(name: str, parameter: Tensor, rows: Sequence[Tensor]) -> None:
    storage = parameter.untyped_storage().data_ptr()
    for position, view in enumerate(rows):
        if view.dim() == 0 or view.untyped_storage().data_ptr() != storage:
            raise ValueError(
                f"NeuronIndex: the neuron rule of {name!r}: expected as view {position} a view of the parameter with "
                f"neurons in dimension 0, got {'a scalar' if view.dim() == 0 else 'a copy'}; use slicing, transpose, "
                "movedim or view."
            )
