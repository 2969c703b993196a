"""Fusion of a pruned network with the one that it was made of, along optimal-transport plans of their neurons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from bdfast.defenses.parts.channel_spaces import Link
from bdfast.defenses.parts.transport import Plan, optimal_plan
from bdfast.neurons import NeuronIndex, NeuronScores
from bdfast.neurons.index import NeuronLayer
from bdfast.neurons.rules import split_neurons

LEAST = 1e-12
"""The least share of a neuron, of the sum of its layer: what receives nothing cannot be divided by what it receives."""

TIE = 1e-6
"""Weight of where a pruned neuron was, among costs. All pruned neurons of a layer are alike, so that many plans cost
the same; which of them the solver finds depends on the order of the neurons."""


@torch.no_grad()
def fuse(
    model: nn.Module,
    pruned: nn.Module,
    scores: NeuronScores,
    neurons: Tensor,
    links: Sequence[Link],
    *,
    share: float,
    tie: float = TIE,
) -> int:
    """Fuse `pruned` into `model`, in place, from the first layer with a pruned neuron on.

    In the channel space of a layer's outputs, a plan moves the neurons of `pruned`, which all send the same, to those
    of `model`, which receive in proportion to their scores. The cost is the distance of the weights, summed over all
    layers that write to the space. Each row becomes the mean of the rows that come to it, and each column that of the
    columns, by the plan of the space that it reads. Where there is no space, rows or columns stay in their order.

    Args:
        model: The given network.
        pruned: A copy of it in which `neurons` are zero.
        scores: The weight change of the neurons that pruning ranks.
        neurons: [R] bool, those that were pruned.
        links: The weights and their spaces, in the order in which "from the first layer on" counts.
        share: Of the pruned network in the fused weights.
        tie: See `TIE`.

    Returns:
        How many weights were fused along a plan.
    """
    given, other = (dict(network.named_parameters(remove_duplicate=False)) for network in (model, pruned))
    changes = {name: values.double().cpu() for name, values in scores.by_layer().items()}
    hit = {layer.parameter for layer in scores.layers if neurons[layer.start : layer.stop].any()}
    first = next((place for place, link in enumerate(links) if link.layer.parameter in hit), len(links))

    plans: dict[int | None, Plan] = {}
    fixed = {None, *(link.results for link in links[:first])}
    for space in dict.fromkeys(link.results for link in links if link.results not in fixed):
        writing = [link.layer for link in links if link.results == space and link.owns]
        received = _sum(changes[layer.parameter] for layer in writing if layer.parameter in changes)
        if received.sum() > 0:
            cost = _sum(_costs(_rows(other, layer), _rows(given, layer), tie) for layer in writing)
            plans[space] = optimal_plan(cost, *_marginals(received))

    aligned = {link.layer.parameter: link for link in links if link.sources in plans or link.results in plans}
    layers = {layer.parameter: layer for layer in (*scores.layers, *(link.layer for link in links))}
    for name, layer in layers.items():
        if name not in aligned and name not in hit:
            continue
        rows, own = _rows(other, layer), _rows(given, layer)
        if name in aligned:
            link = aligned[name]
            rows = _moved(rows, plans.get(link.results), plans.get(link.sources), link.each)
        fused = torch.lerp(own, rows, share)  # where both agree, it is what they are
        views = split_neurons(given[name], layer.split)
        for view, part in zip(views, fused.split([len(view) for view in views]), strict=True):
            view.copy_(part)
    return len(aligned)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return sum(tensors, torch.zeros((), dtype=torch.float64))


def _marginals(changes: Tensor) -> tuple[Tensor, Tensor]:
    """What each neuron of the pruned and of the given network sends and receives."""
    received = changes.clamp(min=LEAST * float(changes.sum()))
    return torch.full_like(received, 1 / len(received)), received / received.sum()


def _rows(parameters: dict[str, nn.Parameter], layer: NeuronLayer) -> Tensor:
    """The neurons of a layer [O, I, ...], float64 on the CPU, where the solver is and sums have one order."""
    return torch.cat(split_neurons(parameters[layer.parameter].detach().double().cpu(), layer.split))


def _costs(pruned: Tensor, given: Tensor, tie: float) -> Tensor:
    pruned, given = pruned.flatten(1), given.flatten(1)
    costs = _distances(pruned, given)
    changed = (pruned != given).any(1)
    # Of what was not pruned the distance to itself is zero, which rounding hides.
    costs.diagonal()[~changed] = 0
    if tie and changed.any():
        places = _distances(given[changed], given)
        places[torch.arange(len(places)), changed.nonzero()[:, 0]] = 0
        costs[changed] += tie * places
    return costs


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean [n, m], from one product of matrices."""
    squares = first.square().sum(1)[:, None] + second.square().sum(1)
    return (squares - 2 * first @ second.T).clamp(min=0).sqrt()


def _moved(rows: Tensor, results: Plan | None, sources: Plan | None, each: int) -> Tensor:
    """Rows [O, I, ...] whose outputs and inputs have gone along the plans of their spaces."""
    if results is not None:
        rows = results.means(rows)
    if sources is None:
        return rows
    columns = rows.reshape(len(rows), sources.received, -1).transpose(0, 1)
    return sources.means(columns.contiguous()).transpose(0, 1).reshape(rows.shape)


def links_in_module_order(index: NeuronIndex, model: nn.Module) -> list[Link]:
    """Each convolution as if it read the one before it, as the published code has it."""
    layers = dict(model.named_modules())
    links: list[Link] = []
    for place, layer in enumerate(index.layers):
        module = layers[layer.module]
        fits = place == 0 or module.in_channels == len(links[-1].layer)
        if not fits or module.groups != 1:
            raise ValueError(
                f"compat: expected convolutions without groups that each read as many channels as the one before it "
                f"has, got {layer.parameter} of shape {list(layer.shape)}; leave compat out."
            )
        links.append(Link(layer, place - 1 if place else None, 1, place))
    return links
