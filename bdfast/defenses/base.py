"""What every defense shares: options in a frozen dataclass, and `run`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from bdfast.data.batches import Batches
from bdfast.defenses.verdict import Verdict
from bdfast.method_options import Checked
from bdfast.neurons import NeuronScores
from bdfast.training import Run


@dataclass(frozen=True, eq=False)
class Outcome:
    """What `run` returns beside the model, which it changed in place; all of it may be left out.

    Attributes:
        scores: What the method measured of every neuron; left out, `purify` measures how far each one has moved.
        neurons: [R] bool, the neurons that it reset; left out, none.
        chosen: Options that the method chose itself, by name.
        found: What else it found out, such as the target label; must be valid JSON.
        verdict: Whether the backdoor is gone, where the method can tell.
    """

    scores: NeuronScores | None = None
    neurons: torch.Tensor | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Defense(Checked, ABC):
    """A purification method; the fields of a subclass are its options.

    Attributes:
        paper: Where the method was published.
    """

    paper: ClassVar[str] = ""
    scored_by: ClassVar[str] = "weight change (sum of |Δw|)"
    """What the scores of the neurons are, for the report."""
    neurons_are: ClassVar[str] = "reset"
    """What happens to the neurons that it picks."""

    def __post_init__(self) -> None:
        """Checks the options; a subclass ends with `super().__post_init__()`."""

    def check(self, model: nn.Module, clean: Batches, run: Run) -> None:
        """Refuse what the method cannot work with; called before `run`, so that no work is lost.

        Raises:
            ValueError: Says why.
        """

    @abstractmethod
    def run(self, model: nn.Module, clean: Batches, run: Run) -> Outcome:
        """Purify `model` in place with clean data only.

        Args:
            model: The network, whose modes the caller restores.
            clean: The clean set; there is no way for triggered or test data to come in.
            run: Seed, precision, progress, history and checkpoints.
        """


@dataclass(frozen=True)
class DataFree(Defense):
    """A method that can do without images: `purify(model, None, method=...)`."""

    @abstractmethod
    def repair(self, model: nn.Module, run: Run) -> Outcome:
        """Purify `model` in place from its weights alone.

        Args:
            model: See `run`.
            run: Seed, precision, progress, history and checkpoints.
        """
