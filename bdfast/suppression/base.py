"""What every suppression method shares: options in a frozen dataclass, and `run`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from bdfast.data.batches import Batches
from bdfast.method_options import Checked
from bdfast.training import Run


@dataclass(frozen=True, eq=False)
class Suppressed:
    """What `run` returns beside the model, which it trained in place.

    Attributes:
        suspected: [M] int64, the indices of the samples that it takes for poisoned, ascending.
        chosen: Options that the method chose itself, by name.
        found: What else it found out; must be valid JSON.
        warnings: What speaks against trusting the result.
    """

    suspected: torch.Tensor
    chosen: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suppression(Checked, ABC):
    """A method that trains on data that may be poisoned; the fields of a subclass are its options.

    Attributes:
        paper: Where the method was published.
    """

    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Checks the options; a subclass ends with `super().__post_init__()`."""

    def check(self, model: nn.Module, suspicious: Batches, run: Run) -> None:
        """Refuse what the method cannot work with; called before `run`, so that no work is lost.

        Raises:
            ValueError: Says why.
        """

    @abstractmethod
    def run(self, model: nn.Module, suspicious: Batches, run: Run) -> Suppressed:
        """Train `model` in place so that it does not learn the backdoor that may be in the data.

        Args:
            model: The network, whose modes the caller restores.
            suspicious: The training data; which samples are poisoned is not known.
            run: Seed, precision, progress, history and checkpoints.
        """
