"""Zeroing neurons: only their most changed sub-weights, or all of their weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdfast import ops
from bdfast.neurons.index import NeuronIndex, Source, aligned_rows
from bdfast.neurons.scores import NeuronScores, index_of

# The published code ranks scores that were written to a text file with four decimals.
OFFICIAL_DECIMALS = 4


@dataclass(frozen=True, eq=False)
class Reinitialized:
    """What `reinitialize` did.

    Attributes:
        neurons: [R] bool, the neurons whose sub-weights were candidates, on the device of the model.
        threshold: The change from which on a sub-weight of these neurons was zeroed.
        zeroed: Number of zeroed sub-weights; more than the requested share if several changes equal the threshold.
    """

    neurons: Tensor
    threshold: float
    zeroed: int


def reinitialize(
    model: Source,
    scores: NeuronScores,
    *,
    n: float,
    m: float,
    changed: tuple[Source, Source],
    compat: str | None = None,
) -> Reinitialized:
    """Zero, in place, the sub-weights that changed most in the neurons that score highest (TSBD, stage 1).

    Takes the K = int(n * R) neurons with the highest scores, of equal scores the earlier one; pools the
    absolute changes of all their weights, M in number; zeroes in `model` those of at least the q-th largest
    change, q = int(M * m), ties included, but none that has not changed. K and q are at least 1. Both products are
    taken in float64 and cut, as in the published code: 0.29 of 100 neurons are 28. The result is the same on every
    backend, bit for bit, given the scores.

    Lin et al., Unveiling and Mitigating Backdoor Vulnerabilities based on Unlearning Weight Changes and
    Backdoor Activeness, NeurIPS 2024, arXiv 2405.20291; n is swept there and m = 0.7.

    Args:
        model: The model to change, usually a copy of `original`. Biases and buffers stay as they are.
        scores: A score for every neuron to consider, usually the neuron weight change.
        n: Share of the neurons to take, in (0, 1].
        m: Share of their sub-weights to zero, in (0, 1].
        changed: The unlearned and the original model, or their state dicts, whose difference is the change.
        compat: "official" ranks scores rounded to four decimals and may zero sub-weights that have not changed, as the
            published code does; None does neither.

    Returns:
        The selected neurons, the threshold and the number of zeroed sub-weights.

    Raises:
        TypeError: An argument is of another type.
        ValueError: `n` or `m` is outside (0, 1], `compat` is unknown, a score or a change is NaN, or the
            models differ in names, shapes, dtype or device. Nothing was changed then.
    """
    for name, share in (("n", n), ("m", m)):
        if not 0 < share <= 1:
            raise ValueError(f"reinitialize: {name}: expected a share in (0, 1], got {share}; 0.1 means ten per cent.")
    if compat not in (None, "official"):
        raise ValueError(
            f'reinitialize: compat: expected None or "official", got {compat!r}; leave it out for the published method.'
        )
    if not (isinstance(changed, Sequence) and len(changed) == 2):
        raise TypeError(
            f"reinitialize: changed: expected two models, got a {type(changed).__name__}; pass "
            "changed=(unlearned, original)."
        )
    if not isinstance(scores, NeuronScores):
        raise TypeError(
            f"reinitialize: scores: expected NeuronScores, got a {type(scores).__name__}; pass what "
            "neuron_weight_change returns, or NeuronScores(values, index.layers)."
        )
    sources = {"model": model, "changed[0]": changed[0], "changed[1]": changed[1]}
    rows, unlearned, original = aligned_rows(scores.layers, sources)

    ranking = scores.ranking(decimals=OFFICIAL_DECIMALS if compat else None)
    neurons = torch.zeros(len(scores), dtype=torch.bool, device=rows[0].device)
    neurons[ranking[: max(1, int(n * len(scores)))].to(neurons.device)] = True
    pool = _sub_weights(rows, neurons)
    threshold = ops.kth_largest_change(unlearned, original, neurons, max(1, int(pool * m)))
    if threshold.isnan():
        raise ValueError(
            "reinitialize: changed: expected two models that differ by numbers, got NaN in the selected neurons; "
            "unlearning has diverged, repeat it with a smaller learning rate."
        )
    if not compat:
        # Where fewer sub-weights have changed than are to be zeroed, those that have not stay.
        threshold = threshold.clamp_min(torch.finfo(torch.float32).tiny)
    zeroed = ops.zero_changed_(rows, unlearned, original, neurons, threshold)
    return Reinitialized(neurons, threshold.item(), int(zeroed))


def prune_neurons(model: Source, mask: Tensor, *, index: NeuronIndex | None = None) -> None:
    """Zero, in place, all weights of the neurons in `mask`. Biases and buffers stay as they are.

    The weights are multiplied by 0, so one that is NaN or infinite becomes NaN.

    Args:
        model: The model to change; a state dict will do if `index` is given.
        mask: [R] bool, True for the neurons to zero: `scores.outliers()`, or `Reinitialized.neurons`.
        index: The neurons that the mask counts, `scores.index` for a mask made from scores; by default all of
            `model`, without the scales of normalisation layers.

    Raises:
        TypeError: An argument is of another type.
        ValueError: `mask` is not a bool vector with one element per neuron. Nothing was changed then.
    """
    index = index_of(model, index)
    rows = aligned_rows(index.layers, {"model": model})[0]
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"prune_neurons: mask: expected a bool tensor, got a {type(mask).__name__}; pass scores.outliers(), or "
            "compare scores.values with a threshold."
        )
    if mask.dtype != torch.bool or mask.shape != (len(index),):
        raise ValueError(
            f"prune_neurons: mask: expected torch.bool of shape ({len(index)},), one element per neuron, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}; pass index=scores.index for a mask made from scores."
        )
    ops.scale_neurons_(rows, (~mask).to(rows[0].device, torch.float32))


def _sub_weights(rows: Sequence[Tensor], neurons: Tensor) -> int:
    columns = torch.tensor([math.prod(view.shape[1:]) for view in rows])
    per_neuron = columns.repeat_interleave(torch.tensor([len(view) for view in rows]))
    return int(per_neuron.to(neurons.device)[neurons].sum())
