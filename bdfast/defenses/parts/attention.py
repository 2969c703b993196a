"""Attention maps: how strongly a network answers at each position of an image, in several layers and one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from bdfast.data.batches import Batches
from bdfast.task import at_least_float32
from bdfast.training import Run
from bdfast.training.modes import eval_mode

MAPS = 3
"""Layers, as published."""

EPS = 1e-6
"""Added to the length of a map, as published."""

TRIED = 2
"""Images in the pass that finds the layers, which keeps all their outputs."""


@dataclass(frozen=True)
class MapLayer:
    """A module whose output is a feature map.

    Attributes:
        name: Of the module.
        axis: The axis of its output that holds the features.
        positions: The sizes of the other axes, but that of the images.
    """

    name: str
    axis: int
    positions: tuple[int, ...]


@contextmanager
def attention_maps(model: nn.Module, layers: list[MapLayer]) -> Iterator[dict[str, Tensor]]:
    """Inside, every pass puts the maps [B, positions] of `layers` into the dict; those that do not run stay out of it.

    A map is the sum of the squares over the features, brought to the length 1.
    """
    maps: dict[str, Tensor] = {}

    def hook_of(layer: MapLayer) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            strength = at_least_float32(output).square().sum(layer.axis).flatten(1)
            maps[layer.name] = strength / (strength.norm(dim=1, keepdim=True) + EPS)

        return hook

    handles = [model.get_submodule(layer.name).register_forward_hook(hook_of(layer)) for layer in layers]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def layers_with_maps(model: nn.Module, data: Batches, run: Run) -> list[MapLayer]:
    """The layers of a network whose maps are compared, early to late, found by a pass: names say nothing.

    What counts as a stage or block are modules of the same class beside each other, such as the stages of a ResNet, the
    blocks of a transformer or the layers of a plain network. Their last output at each of the last three sizes is
    taken; where there are fewer sizes, three outputs at equal distances.

    Args:
        model: Any network; only read.
        data: Some of its inputs are used.
        run: Gives the forward pass.

    Raises:
        ValueError: There is no layer whose output has positions.
    """
    found = _feature_maps(model, data, run)
    if not found:
        raise ValueError(
            "model: expected layers whose outputs have positions, [B, C, H, W] or [B, tokens, D], since they are "
            f"compared there, got none that run once in a pass of a {type(model).__name__}; take another method."
        )
    blocks = _blocks(model, found)
    blocks = [layer for layer in blocks if len(layer.positions) == len(blocks[-1].positions)]
    last_of_size = sorted({layer.positions: index for index, layer in enumerate(blocks)}.values())
    if len(last_of_size) >= MAPS:
        return [blocks[index] for index in last_of_size[-MAPS:]]
    spaced = {-(-part * len(blocks) // MAPS) - 1 for part in range(1, MAPS + 1)}
    return [blocks[index] for index in sorted(spaced)]


def _feature_maps(model: nn.Module, data: Batches, run: Run) -> list[MapLayer]:
    """Every module that runs once and whose output has positions, in the order in which they end."""
    outputs: list[tuple[str, nn.Module, Any, int]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs.append((name, module, output, output._version if isinstance(output, Tensor) else 0))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with eval_mode(model), torch.no_grad():
            count = len(run.forward(model, next(iter(data.in_batches_of(TRIED).ordered())))[0])
    finally:
        for handle in handles:
            handle.remove()
    passes = Counter(name for name, _, _, _ in outputs)
    tensors = [row for row in outputs if isinstance(row[2], Tensor) and row[2].ndim > 2 and len(row[2]) == count]
    behind = {row[2].shape[2:] for row in tensors if isinstance(row[1], (_ConvNd, _NormBase, nn.GroupNorm))}
    between = {row[2].shape[1:-1] for row in tensors if isinstance(row[1], (nn.Linear, nn.LayerNorm))}
    found = []
    for name, _, output, version in tensors:
        # What is written over after the module ends, as by an activation in place, has no gradient of its own.
        if passes[name] > 1 or output._version != version:
            continue
        # Layers of a known kind tell where their features are, and other outputs are read as those of the same sizes.
        axis = 1 if output.shape[2:] in behind else -1 if output.shape[1:-1] in between else None
        if axis is not None:
            positions = output.shape[2:] if axis == 1 else output.shape[1:-1]
            if prod(positions) > 1:
                found.append(MapLayer(name, axis, tuple(positions)))
    return found


def _blocks(model: nn.Module, found: list[MapLayer]) -> list[MapLayer]:
    """Those that have another of the same class beside them, and lie in no such module; all where there are none."""
    kinds = {layer.name: (layer.name.rpartition(".")[0], type(model.get_submodule(layer.name))) for layer in found}
    counts = Counter(kinds.values())
    repeated = {name for name, kind in kinds.items() if counts[kind] > 1}
    outer = [layer for layer in found if layer.name in repeated and not repeated.intersection(_around(layer.name))]
    return outer or found


def _around(name: str) -> list[str]:
    """The names of the modules that a module lies in."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
