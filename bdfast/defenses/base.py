"""What every defense shares: options in a frozen dataclass, and `run`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from bdfast.data.batches import Batches
from bdfast.scores import NeuronScores
from bdfast.training import Run


@dataclass(frozen=True)
class Outcome:
    """What `run` hands back beside the model, which it changed in place.

    Attributes:
        scores: What the method measured of every neuron.
        neurons: [R] bool, the neurons that it reset.
        chosen: Options that the method chose itself, by name.
        found: What else it found out, such as the target label; fit for JSON.
    """

    scores: NeuronScores
    neurons: torch.Tensor
    chosen: dict[str, Any]
    found: dict[str, Any]


@dataclass(frozen=True)
class Defense(ABC):
    """A purification method; the fields of a subclass are its options.

    Attributes:
        strength: The option that says how hard the method hits, where `bdfast.selection` may choose it; else empty.
        ladder: Its values to choose from, weak to strong.
    """

    paper: ClassVar[str]
    strength: ClassVar[str] = ""
    ladder: ClassVar[Sequence[float]] = ()

    @abstractmethod
    def run(self, model: nn.Module, clean: Batches, run: Run) -> Outcome:
        """Purify `model` in place with clean data only.

        Args:
            model: The network, whose modes the caller puts back.
            clean: The clean set; there is no way for triggered or test data to come in.
            run: Seed, precision, progress, history and journal.
        """
