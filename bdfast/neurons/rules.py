"""Rules that say which rows of which parameters are neurons, one rule per module type.

A rule names the parameters of a module that hold neurons, and for each the dimension of the neurons (0 for Linear and
Conv, whose rows already are the output units) or a function from the parameter to views of it with neurons in dimension
0. These must be views, not copies, so that writing to them changes the parameter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

Split: TypeAlias = int | Callable[[Tensor], Sequence[Tensor]]
Rule: TypeAlias = Callable[[Any], Mapping[str, Split]]

_RULES: dict[type[nn.Module], tuple[str, Rule]] = {}


def register_neurons(*module_types: type[nn.Module], kind: str) -> Callable[[Rule], Rule]:
    """Register the decorated function as the neuron rule of some module types, and of their subclasses.

    A second registration of a type replaces the first, and a rule that returns an empty mapping makes its
    type have no neurons. Example, for the Conv1D of Hugging Face's GPT-2, a linear layer that stores its
    weight transposed::

        @register_neurons(Conv1D, kind="linear")
        def conv1d_neurons(module):
            return {"weight": 1}

    Args:
        module_types: One or more subclasses of `torch.nn.Module`.
        kind: Word to select the neurons by: "conv", "linear", "embedding", "attention", "norm" or a new one.

    Returns:
        A decorator for `rule(module) -> {attribute name: split}`. A split is the dimension of the neurons, or
        a function from the parameter to a sequence of views with neurons in dimension 0, in the order of the
        output units. Use a module-level function or a `functools.partial` of one, so that indices can be
        copied and pickled. Names of parameters that a module lacks, or has set to None, are passed over.

    Raises:
        TypeError: A module type is not a subclass of `torch.nn.Module`.
    """
    for position, module_type in enumerate(module_types):
        if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
            raise TypeError(
                f"register_neurons: module_types[{position}]: expected a subclass of torch.nn.Module, got "
                f"{module_type!r}; pass the class, not an instance, and the kind by keyword."
            )

    def register(rule: Rule) -> Rule:
        for module_type in module_types:
            _RULES[module_type] = (kind, rule)
        return rule

    return register


def known_kinds() -> tuple[str, ...]:
    """Every kind of neuron that has a rule, in order of registration."""
    return tuple(dict.fromkeys(kind for kind, _ in _RULES.values()))


def neuron_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, str, Split]]:
    """Yield (attribute, parameter, kind, split) for every own parameter of `module` that holds neurons.

    Only floating-point entries of the module's own parameter table count. That leaves out quantised weights,
    which have no arithmetic, and weights that are computed at each forward pass (weight_norm,
    parametrizations, pruning masks), where the next call would overwrite any change.
    """
    for module_type in type(module).__mro__:
        if module_type in _RULES:
            kind, rule = _RULES[module_type]
            for attribute, split in rule(module).items():
                parameter = module._parameters.get(attribute)
                if parameter is not None and parameter.is_floating_point():
                    yield attribute, parameter, kind, split
            return


def split_neurons(tensor: Tensor, split: Split) -> list[Tensor]:
    """Views of `tensor` with neurons in dimension 0."""
    return [tensor.movedim(split, 0)] if isinstance(split, int) else list(split(tensor))


@register_neurons(nn.Conv1d, nn.Conv2d, nn.Conv3d, kind="conv")
@register_neurons(nn.Linear, nn.Bilinear, kind="linear")
@register_neurons(nn.Embedding, nn.EmbeddingBag, kind="embedding")  # a row per token, not per feature
def _first_dimension(module: nn.Module) -> dict[str, Split]:
    return {"weight": 0}


@register_neurons(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, kind="conv")
def _transposed_convolution(module: nn.ConvTranspose2d) -> dict[str, Split]:
    return {"weight": partial(_transposed_groups, groups=module.groups)}


def _transposed_groups(weight: Tensor, groups: int) -> list[Tensor]:
    # [Cin, Cout / groups, ...]: each group maps its own slice of inputs to its own range of output channels.
    return [group.transpose(0, 1) for group in weight.tensor_split(groups)]


@register_neurons(nn.MultiheadAttention, kind="attention")
def _multihead_attention(module: nn.Module) -> dict[str, Split]:
    # Packed when keys and values are as wide as queries. The output projection is a Linear of its own.
    return dict.fromkeys(("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), 0)


@register_neurons(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, kind="norm")
@register_neurons(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, kind="norm")
@register_neurons(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, kind="norm")
def _normalisation(module: nn.Module) -> dict[str, Split]:
    return {"weight": _elements}


def _elements(weight: Tensor) -> list[Tensor]:
    return [weight.view(-1, 1)]
