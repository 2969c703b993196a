"""What the defenses share that train in stages: from a low learning rate to higher ones, as far as the judge says."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from bdfast.data.batches import Batches
from bdfast.defenses.base import Outcome
from bdfast.defenses.fine_tuning import FineTuning
from bdfast.defenses.verdict import suspicion, verdict_of
from bdfast.inversion.surrogates import Surrogates
from bdfast.neurons import NeuronScores
from bdfast.selection import Judge, climb
from bdfast.training import Run
from bdfast.training.budget import budget
from bdfast.training.copies import copy_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Begun:
    """A method after what it does once, before it trains.

    Attributes:
        train: (options with a learning rate, images, name of the stage): trains the model further, in place.
        scores: See `Outcome`.
        neurons: See `Outcome`.
        found: See `Outcome`.
        done: What was done to the model, for `found`, unless that is undone.
        restart: Called when the model is again as it was here, to bring back what else training has changed.
    """

    train: Callable[[Any, Batches, str], None]
    scores: NeuronScores | None = None
    neurons: torch.Tensor | None = None
    found: dict[str, Any] = field(default_factory=dict)
    done: dict[str, Any] = field(default_factory=dict)
    restart: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Staged(FineTuning):
    """Fine-tuning at a learning rate that is found by `bdfast.selection`, unless one is given.

    Attributes:
        lr: Learning rate in the first epoch of a stage. Left out, stages of rising rates follow each other until
            surrogate triggers have lost their effect on held-out images (a quarter of `clean`). With a rate there is
            one stage on all images, and no verdict.
        epochs: Epochs of a stage, in batches as they are handed in; left out, as many as make `updates`.
        updates: Updates of a stage, about; batch size and epochs follow from the number of images.
        max_accuracy_drop: Budget of held-out accuracy, as a fraction.
    """

    updates: int = 100
    max_accuracy_drop: float = 0.03

    rates: ClassVar[Sequence[float]] = (0.01, 0.03, 0.1)
    """The learning rates of the stages, weak to strong."""

    unsuspected: ClassVar[int | None] = None
    """Most stages where no class is clearly suspected; None for all."""

    def __post_init__(self) -> None:
        self.check_at_least("updates", 1)
        self.check_positive("max_accuracy_drop")
        super().__post_init__()

    @abstractmethod
    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """What is done once: `model` may be changed in place.

        Args:
            model: What is purified.
            given: The original model; only read.
            data: The images to train on.
            run: Seed, precision, progress, history and checkpoints.
            surrogates: What the judge found, where there is one and `data` are images.
        """

    @property
    def parts(self) -> int:
        """How many times a stage trains for `epochs`."""
        return 1

    def suspected(self) -> int | None:
        """The target label, where it is known."""
        return getattr(self, "target", None)

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Outcome:
        """Purify `model` in place; see `Defense.run`.

        Raises:
            FloatingPointError: Training became NaN or infinite, at lower rates too.
        """
        given = copy_of(model)
        if self.lr is not None:
            begun = self.begin(model, given, clean, run, None)
            options, data = self._sized(clean)
            begun.train(options, data, "fine-tune")
            return Outcome(begun.scores, begun.neurons, found={**begun.found, **begun.done})
        judge = Judge(given, clean, run, target=self.suspected())
        begun = self.begin(model, given, judge.tuning, run, judge.surrogates)
        options, data = self._sized(judge.tuning)
        tried: list[float] = []

        def train(rate: float) -> None:
            if tried and rate < tried[-1]:  # a ladder that was lowered
                begun.restart()
            # Checkpoints go by the name, and a lowered ladder may come to a rate of before.
            name = f"fine-tune at {rate:g}" + ", again" * [f"{x:g}" for x in tried].count(f"{rate:g}")
            tried.append(rate)
            begun.train(replace(options, lr=rate), data, name)

        choice = climb(
            self.rates if judge.clear else self.rates[: self.unsuspected],
            train,
            model,
            judge,
            run,
            max_accuracy_drop=self.max_accuracy_drop,
        )
        neurons, done = begun.neurons, begun.done
        if choice.strength is None:
            model.load_state_dict(given.state_dict())
            neurons, done = None, {}
        found = {**begun.found, **done, **suspicion(judge)}
        return Outcome(begun.scores, neurons, {"lr": choice.strength}, found, verdict_of(judge, choice))

    def _sized(self, data: Batches) -> tuple[Any, Batches]:
        """These options with their number of epochs, and the images in batches to go with it."""
        if self.epochs is not None:
            return self, data
        length = budget(max(1, self.updates // self.parts), len(data))
        return replace(self, epochs=length.epochs), data.in_batches_of(length.batch_size)


@dataclass(frozen=True)
class InRounds(Staged):
    """A method that looks for something anew several times in a stage, and trains after each.

    Attributes:
        rounds: How often.
    """

    rounds: int = 5

    def __post_init__(self) -> None:
        self.check_at_least("rounds", 1)
        super().__post_init__()

    @property
    def parts(self) -> int:
        """How many times a stage trains for `epochs`."""
        return self.rounds
