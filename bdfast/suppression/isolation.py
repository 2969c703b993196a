"""Which samples are set apart, and what their labels say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdfast.suppression.sample_losses import SampleScores

WATCHED = 1000
"""Samples, spread evenly over the data, whose accuracy tells what unlearning costs."""


@dataclass(frozen=True, eq=False)
class Isolation:
    """The samples with the least loss, and the others.

    Attributes:
        losses: Of all samples.
        places: [k] int64, where the isolated ones stand in the data, ascending.
    """

    losses: SampleScores
    places: Tensor

    @property
    def rest(self) -> Tensor:
        """Where the others stand: [N - k] int64."""
        mask = torch.ones(len(self.losses.scores), dtype=torch.bool)
        mask[self.places] = False
        return mask.nonzero().squeeze(1)

    @property
    def labels(self) -> dict[str, int]:
        """How many of the isolated samples have each label, the most frequent first; empty without labels [N]."""
        if not len(self.losses.labels):
            return {}
        labels, counts = self.losses.labels[self.places].unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        return {str(label): count for label, count in zip(labels[order].tolist(), counts[order].tolist(), strict=True)}

    @property
    def label_numbers(self) -> Tensor:
        """[L] int64, the labels that occur among the isolated samples."""
        return torch.tensor([int(label) for label in self.labels], dtype=torch.int64)

    @property
    def bystanders(self) -> Tensor:
        """At most WATCHED of the rest, without the most frequent label of the isolated samples.

        The poisoned samples among the rest, which a network without the backdoor gets wrong, have that label.
        """
        rest = self.rest
        if self.labels:
            other = rest[self.losses.labels[rest] != int(next(iter(self.labels)))]
            rest = other if len(other) else rest
        return rest[:: -(-len(rest) // WATCHED)]

    def warnings(self) -> list[str]:
        """What speaks against these samples being poisoned."""
        if not self.labels:
            return []
        label, count = next(iter(self.labels.items()))
        if 2 * count > len(self.places):
            return []
        return [
            f"suspicious: expected isolated samples of one label, got {count} of {len(self.places)} with the most "
            f"frequent, {label}: the data may be clean, or poisoned towards several labels, where this method does "
            "little. Look at the suspected samples."
        ]
