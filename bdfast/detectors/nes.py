"""Gradients of what can only be asked for its value: natural evolution strategies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Probes = tuple[Tensor, Tensor]
"""Samples, and the gradient of the logarithm of their probability by the parameter: both [n, ...]."""


def gradient(
    draw: Callable[[int], Probes],
    losses: Callable[[Tensor], Tensor],
    probes: int,
    at_once: int,
    *,
    baseline: bool,
) -> Tensor:
    """The mean of loss times score over random samples: without bias, the gradient of the expected loss.

    Wierstra et al., "Natural evolution strategies" (JMLR 2014), without the natural gradient. No sample is kept.

    Args:
        draw: n -> that many samples and scores.
        losses: Samples [n, *lead, ...] -> their losses [n, *lead]; with dimensions `lead` it is one gradient for each.
        probes: How many samples; with a baseline at least two.
        at_once: Most of them in one call of `losses`.
        baseline: Take the mean loss of the other samples away from each: the same on average, with less noise.

    Returns:
        Of the shape of one sample, or of the parameter that `draw` gives the score for.
    """
    weighted = plain = total = torch.zeros(())
    for first in range(0, probes, at_once):
        samples, scores = draw(min(at_once, probes - first))
        values = losses(samples).to(scores.dtype)
        spread = values.view(values.shape + (1,) * (scores.ndim - values.ndim))
        weighted, plain = (spread * scores).sum(0) + weighted.to(scores), scores.sum(0) + plain.to(scores)
        total = values.sum(0) + total.to(values)
    if not baseline:
        return weighted / probes
    mean = (total / probes).view(total.shape + (1,) * (plain.ndim - total.ndim))
    return (weighted - mean * plain) / (probes - 1)


def bernoulli(share: Tensor, draws: torch.Generator) -> Callable[[int], Probes]:
    """Masks of 0 and 1, with the score by theta, where share = (tanh(theta) + 1) / 2: it is 2 (mask - share)."""

    def draw(count: int) -> Probes:
        uniform = torch.rand(count, *share.shape, generator=draws).to(share.device)
        masks = (uniform < share).to(share.dtype)
        return masks, 2 * (masks - share)

    return draw


def gaussian(middle: Tensor, sigma: float, draws: torch.Generator) -> Callable[[int], Probes]:
    """middle + sigma noise, with the score by `middle`, which is noise / sigma."""

    def draw(count: int) -> Probes:
        noise = torch.randn(count, *middle.shape, generator=draws).to(middle)
        return middle + sigma * noise, noise / sigma

    return draw
