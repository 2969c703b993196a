"""The loss of every sample of a data set, in one pass of whole batches; and the samples with the least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdfast.data.batches import Batch, Batches
from bdfast.task import IGNORED, Forward, at_least_float32
from bdfast.training.modes import eval_mode


def sample_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy [B] of each sample, from logits [B, ..., K] and targets [B, ...], in float32 or more.

    Of tokens it is the mean over those of the sample; `IGNORED` targets do not count, and a sample of nothing else
    has a loss of zero.
    """
    flat = at_least_float32(logits).flatten(0, -2)
    losses = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="none")
    if targets.ndim == 1:
        return losses
    return losses.view(len(targets), -1).sum(1) / counted(targets).clamp(min=1)


def counted(targets: Tensor) -> Tensor:
    """Of targets [B, ...], how many of each sample count: [B] int64."""
    return (targets != IGNORED).view(len(targets), -1).sum(1)


@dataclass(frozen=True, eq=False)
class SampleScores:
    """A number for every sample, in the order of the data.

    Attributes:
        indices: [N] int64, of the samples in the data set.
        scores: [N], float32 or float64.
        labels: [N] int64, where every sample has one label; else empty.
    """

    indices: Tensor
    scores: Tensor
    labels: Tensor

    def lowest(self, count: int) -> Tensor:
        """Where the `count` lowest scores stand, ascending: [count] int64. Equal scores go by index."""
        by_index = self.indices.argsort(stable=True)
        ranked = self.scores[by_index].argsort(stable=True)
        return by_index[ranked[:count]].sort().values

    def as_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"indices": self.indices, "scores": self.scores, "labels": self.labels}


@torch.no_grad()
def scored(networks: list[nn.Module], data: Batches, score: Callable[[Batch], tuple[Tensor, Tensor]]) -> SampleScores:
    """Score every sample, in eval mode, in the batches of the data.

    Memory holds one batch and a few bytes a sample.

    Args:
        networks: What `score` runs; in eval mode meanwhile.
        data: Read once, in order.
        score: Batch -> the scores [B] and the targets [B, ...] of its samples.

    Raises:
        ValueError: A score is NaN; the message names the sample.
    """
    indices, scores, labels = [], [], []
    modes = [eval_mode(network) for network in networks]
    for mode in modes:
        mode.__enter__()
    try:
        for numbers, batch in data.numbered():
            values, targets = score(batch)
            # A target that does not count says nothing: such a sample is never among the lowest.
            scores.append(values.masked_fill(counted(targets) == 0, float("inf")))
            indices.append(numbers)
            if targets.ndim == 1:
                labels.append(targets)
    finally:
        for mode in modes:
            mode.__exit__(None, None, None)
    found = SampleScores(
        torch.cat(indices).cpu(),
        torch.cat(scores).cpu(),
        torch.cat(labels).cpu() if labels else torch.empty(0, dtype=torch.int64),
    )
    if bool((damaged := found.scores.isnan()).any()):
        raise ValueError(
            f"{data.name}: expected a loss of every sample, got NaN for sample "
            f"{int(found.indices[damaged][0])}; look for NaN in the images, or lower the learning rate (lr)."
        )
    return found


def losses_of(model: nn.Module, data: Batches, forward: Forward) -> SampleScores:
    """The loss of every sample in eval mode, in the precision of the weights.

    Not in bfloat16: it rounds the small losses, which matter here, by as much as they differ.
    """

    def score(batch: Batch) -> tuple[Tensor, Tensor]:
        logits, targets = forward(model, batch)[:2]
        return sample_losses(logits, targets), targets

    return scored([model], data, score)
