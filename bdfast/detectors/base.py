"""What every detector shares: options in a frozen dataclass, and `run`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdfast.data.batches import Batches
from bdfast.method_options import Checked
from bdfast.training import Run

Predict = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] -> probabilities [B, K]: all that a black box gives away."""


@dataclass(frozen=True, eq=False)
class Finding:
    """What a detector measured.

    Attributes:
        score: How suspicious the network is; greater is more, on a scale of the detector's own.
        targets: The labels that it would suspect, the most suspicious first; (-1,) for a trigger with a target for each
            label. A network that turns out not to be suspicious has them, too.
        evidence: By name, a figure for each class; NaN for a class that was not looked at.
        trigger: [C, H, W], the trigger that it guessed, where it guesses one.
        mask: [1 or C, H, W] in [0, 1], where the trigger covers the image; None for one that is added.
        notes: What to know when reading them.
    """

    score: float
    targets: tuple[int, ...] = ()
    evidence: dict[str, list[float]] = field(default_factory=dict)
    trigger: Tensor | None = None
    mask: Tensor | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Detector(Checked, ABC):
    """A detection method; the fields of a subclass are its options."""

    paper: ClassVar[str] = ""
    """Where it was published."""
    scored_by: ClassVar[str] = ""
    """What the score is, for people."""
    published_threshold: ClassVar[float | None] = None
    """The score above which the source calls a network backdoored."""

    def __post_init__(self) -> None:
        """Checks the options; a subclass ends with `super().__post_init__()`."""

    @abstractmethod
    def run(self, model: nn.Module, clean: Batches, run: Run) -> Finding:
        """Look at a network; it is left as it was.

        Args:
            model: The suspect network; the caller restores modes, and whether parameters need gradients.
            clean: Clean images; there is no way for triggered or test data to come in.
            run: Seed, precision and progress.

        Raises:
            ValueError: It cannot work with this network or these images, and why.
        """


@dataclass(frozen=True)
class BlackBox(Detector):
    """A detector that only asks for predictions: `detect` also takes a function in place of a network."""

    @abstractmethod
    def query(self, predict: Predict, clean: Batches, run: Run) -> Finding:
        """Look at what answers.

        Args:
            predict: Images [B, C, H, W] -> probabilities [B, K]; called with at most a batch of `clean` at a time.
            clean: See `run`.
            run: See `run`.
        """

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Finding:
        """See `Detector.run`."""
        return self.query(probabilities(model, clean, run), clean, run)


def probabilities(model: nn.Module, clean: Batches, run: Run) -> Predict:
    """What a black box would answer, from a network that is in eval mode."""

    def predict(images: Tensor) -> Tensor:
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        with torch.no_grad(), run.autocast(clean.device):
            logits = run.forward(model, (images, labels))[0]
        return logits.float().softmax(-1)

    return predict
