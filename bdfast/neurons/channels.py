"""Channels: what pruning methods switch off. The scales of normalisation layers; without these, output units."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bdfast import ops
from bdfast.neurons.index import NeuronIndex, NeuronLayer
from bdfast.neurons.rules import split_neurons


def channel_index(model: nn.Module, classifier: str | None) -> NeuronIndex:
    """The channels of a network.

    Each channel is an element of the scale of a normalisation layer (BatchNorm, GroupNorm, LayerNorm and the like), as
    ANP and RNP have it. In a network without such scales it is an output unit of a convolution or linear layer.

    Args:
        model: Any network.
        classifier: Name of the layer whose outputs are the logits, which are no channels.

    Raises:
        ValueError: There are none.
    """
    try:
        return NeuronIndex(model, kinds="norm")
    except ValueError:
        return NeuronIndex(model, kinds=("conv", "linear"), exclude=() if classifier is None else classifier)


def scaled(model: nn.Module, index: NeuronIndex, factors: Tensor) -> dict[str, Tensor]:
    """The weights of the channels times `factors` [C], by name; gradients flow to the factors."""
    return _times(model, index.layers, factors, lambda layer: layer.parameter)


def scaled_biases(model: nn.Module, index: NeuronIndex, factors: Tensor) -> dict[str, Tensor]:
    """The same of the biases beside these weights, as far as there are any."""
    return _times(model, index.layers, factors, bias_of)


def bias_of(layer: NeuronLayer) -> str:
    """The name that a bias beside the weight of a layer has."""
    return f"{layer.module}.bias" if layer.module else "bias"


def scale_channels(model: nn.Module, index: NeuronIndex, factors: Tensor, *, biases: bool = False) -> None:
    """Multiply the channels by `factors` [C] in place; their biases, too, or else 0 leaves a constant."""
    rows = index.rows(model)
    ops.scale_neurons_(rows, factors.to(rows[0].device, torch.float32))
    if biases:
        named = dict(model.named_parameters(remove_duplicate=False))
        for layer in index.layers:
            bias = named.get(bias_of(layer))
            if bias is not None:
                bias.data.mul_(factors[layer.start : layer.stop].to(bias).view_as(bias))


def _times(
    model: nn.Module, layers: tuple[NeuronLayer, ...], factors: Tensor, name_of: Callable[[NeuronLayer], str]
) -> dict[str, Tensor]:
    named = dict(model.named_parameters(remove_duplicate=False))
    result = {}
    for layer in layers:
        parameter = named.get(name_of(layer))
        if parameter is None:
            continue
        part = factors[layer.start : layer.stop].to(parameter.dtype)
        if parameter.numel() == len(part):
            factor = part.view_as(parameter)
        elif isinstance(layer.split, int):
            factor = part.view([-1 if axis == layer.split else 1 for axis in range(parameter.ndim)])
        else:
            factor = part[_numbers(parameter, layer)]
        result[name_of(layer)] = parameter * factor
    return result


def _numbers(parameter: Tensor, layer: NeuronLayer) -> Tensor:
    """Of each element of a parameter, the number of its channel in the layer."""
    numbers = torch.zeros_like(parameter, dtype=torch.long, requires_grad=False)
    first = 0
    for rows in split_neurons(numbers, layer.split):
        rows += torch.arange(first, first + len(rows), device=rows.device).view(-1, *[1] * (rows.ndim - 1))
        first += len(rows)
    return numbers
