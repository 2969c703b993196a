"""What the defenses share that switch channels off: which ones they say, how many is for `bdfast.selection` to find."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from bdfast.data.batches import Batches
from bdfast.defenses.base import Defense, Outcome
from bdfast.defenses.verdict import suspicion, verdict_of
from bdfast.neurons import NeuronScores
from bdfast.neurons.channels import scale_channels
from bdfast.selection import Judge, climb
from bdfast.training import Run
from bdfast.training.batchnorm import recalibrate
from bdfast.training.copies import copy_of


@dataclass(frozen=True)
class Pruning(Defense):
    """Pruning of channels: the scales of normalisation layers or, in a network without them, output units.

    Attributes:
        bn: "recalibrate" estimates the BatchNorm statistics anew on the clean images once channels are off, since stale
            ones can hide a backdoor that is still there; "frozen" leaves them, as the published code does.
        max_accuracy_drop: Budget of held-out accuracy, as a fraction.
    """

    bn: Literal["recalibrate", "frozen"] = "recalibrate"
    max_accuracy_drop: float = 0.03

    neurons_are: ClassVar[str] = "pruned"

    strength: ClassVar[str]
    """The option that says how many channels go; left out, `bdfast.selection` finds it on held-out images."""
    ladder: ClassVar[Sequence[float]] = ()
    """The values of that option which are tried, weak to strong; see `strengths`."""
    biases: ClassVar[bool] = False
    """Whether the biases of the channels go, too."""

    def __post_init__(self) -> None:
        self.check_positive("max_accuracy_drop")
        super().__post_init__()

    @abstractmethod
    def rank(self, model: nn.Module, data: Batches, run: Run) -> NeuronScores:
        """A score of every channel, higher for what is more suspicious; `model` is only read."""

    @abstractmethod
    def chosen(self, scores: NeuronScores, strength: float) -> torch.Tensor:
        """[C] bool, the channels that go."""

    def apply(self, model: nn.Module, scores: NeuronScores, strength: float, data: Batches, run: Run) -> dict[str, Any]:
        """Prune `model`, which has the given weights, in place; returns what is to be known of it (`Outcome.found`)."""
        scale_channels(model, scores.index, ~self.chosen(scores, strength), biases=self.biases)
        return {}

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Outcome:
        """Purify `model` in place; see `Defense.run`."""
        value = getattr(self, self.strength)
        if value is not None:
            scores = self.rank(model, clean, run)
            found = self._pruned(model, scores, value, clean, run)
            return Outcome(scores, self.chosen(scores, value), found=found)
        given = copy_of(model)
        judge = Judge(given, clean, run)
        scores = self.rank(model, judge.tuning, run)
        done: dict[float | None, dict[str, Any]] = {None: {}}

        def prune(strength: float) -> None:
            model.load_state_dict(given.state_dict())
            done[strength] = self._pruned(model, scores, strength, judge.tuning, run)

        choice = climb(
            self.strengths(scores),
            prune,
            model,
            judge,
            run,
            max_accuracy_drop=self.max_accuracy_drop,
            option=self.strength,
        )
        if choice.strength is None:
            model.load_state_dict(given.state_dict())
        neurons = None if choice.strength is None else self.chosen(scores, choice.strength)
        found = {**done[choice.strength], **suspicion(judge)}
        return Outcome(scores, neurons, {self.strength: choice.strength}, found, verdict_of(judge, choice))

    def strengths(self, scores: NeuronScores) -> list[float]:
        """The values of the option that are tried: those of the ladder at which more channels go than before."""
        counts = [int(self.chosen(scores, strength).sum()) for strength in self.ladder]
        return [step for place, step in enumerate(self.ladder) if counts[place] > max([0, *counts[:place]])]

    def _pruned(
        self, model: nn.Module, scores: NeuronScores, strength: float, data: Batches, run: Run
    ) -> dict[str, Any]:
        found = self.apply(model, scores, strength, data, run)
        if self.bn == "recalibrate":
            recalibrate(model, data.ordered(), run.forward)
        return found
