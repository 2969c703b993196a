"""What the defenses share that fine-tune on the clean set: their options, and the loop."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from bdfast.batchnorm import Policy, batchnorms, kept_statistics, recalibrate
from bdfast.data.batches import Batch, Batches
from bdfast.defenses.base import Defense, Outcome
from bdfast.guided_loss import GuidedLoss
from bdfast.scores import neuron_weight_change
from bdfast.selection import PROBE_EPOCHS, choose_strength
from bdfast.sharpness import SharpOptimizer, check_finite_gradients
from bdfast.training import Run, StepResult, derived_seed

if TYPE_CHECKING:
    from typing_extensions import Self

Schedule = Literal["cosine", "constant"]

HELD_OUT = 0.1
"""Share of the clean images that `patience` looks at."""


@dataclass(frozen=True)
class FineTuning(Defense):
    """Fine-tuning on clean images with the optimizer that a subclass chooses.

    Attributes:
        epochs: Epochs of the fine-tuning.
        lr: Learning rate in its first epoch.
        schedule: How it falls from epoch to epoch: "cosine", to zero, or "constant".
        momentum: Of SGD.
        weight_decay: L2 penalty.
        distill: Share of the loss that asks for the answers of the model as it was given; published: 0.
        overlay: Greatest weight of another clean image laid over each; published: 0. See `bdfast.guided_loss` for both.
        label_smoothing: Share of the label that is spread over all classes.
        bn: Which pass moves the BatchNorm statistics; see `bdfast.batchnorm.Policy`.
        patience: Set a tenth of the clean images aside, and end after this many epochs without a new best accuracy on
            them; left out, all images are used in all epochs.
        max_accuracy_drop: Budget of clean accuracy for the choice of the strength, as a fraction, counted from its
            weakest setting: fine-tuning has a price of its own.
    """

    epochs: int = 10
    lr: float = 0.05
    schedule: Schedule = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    distill: float = 0.9
    overlay: float = 0.15
    label_smoothing: float = 0.0
    bn: Policy = "at_theta"
    patience: int | None = None
    max_accuracy_drop: float = 0.01

    official_statistics: ClassVar[Literal["first", "perturbed", "after"]] = "first"
    """The pass that moves the BatchNorm statistics in the published code: `bn="official"`."""

    def __post_init__(self) -> None:
        for name in ("lr", "max_accuracy_drop"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}; see its default.")
        for name, most in (("distill", 1.0), ("overlay", 0.49), ("label_smoothing", 0.9), ("momentum", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name}: expected a share in [0, {most:g}], got {getattr(self, name)}; see its default."
                )
        for name, least in (("epochs", 0), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}; see its default.")

    @abstractmethod
    def optimizer(self, model: nn.Module, given: nn.Module) -> torch.optim.Optimizer:
        """What moves the weights of `model`; `given` is the network as it was handed in."""

    def settled(
        self, given: nn.Module, clean: Batches, run: Run, change: Callable[[Batch], Batch] | None = None
    ) -> tuple[Self, dict[str, Any]]:
        """These options with a strength, and by name what had to be chosen for that, by `bdfast.selection`."""
        if getattr(self, self.strength) is not None:
            return self, {}

        def attempt(value: float, candidate: nn.Module, images: Batches, stage: str) -> None:
            short = self._with_strength(value)
            short.fine_tune(candidate, given, images, run, stage, epochs=PROBE_EPOCHS, change=change, record=False)

        value = choose_strength(
            self.strength, self.ladder, attempt, given, clean, run, max_accuracy_drop=self.max_accuracy_drop
        )
        return self._with_strength(value), {self.strength: value}

    def _with_strength(self, value: float) -> Self:
        options: dict[str, Any] = {self.strength: value}
        return replace(self, **options)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before every step; what it counts has to lie in the groups of the optimizer."""

    def fine_tune(
        self,
        model: nn.Module,
        given: nn.Module,
        data: Batches,
        run: Run,
        stage: str,
        *,
        epochs: int | None = None,
        change: Callable[[Batch], Batch] | None = None,
        record: bool = True,
    ) -> None:
        """The loop, in place.

        Args:
            model: What is trained.
            given: The network as it was handed in, which teaches.
            data: Clean images.
            run: Seed, precision, progress, history and journal.
            stage: Name of the stage in these.
            epochs: Passes over `data`, if not those of the options.
            change: Applied to each batch once the teacher has answered.
            record: Put the epochs into the history.
        """
        epochs = self.epochs if epochs is None else epochs
        optimizer = self.optimizer(model, given)
        guided_loss = GuidedLoss(run, given, self.distill, self.overlay, self.label_smoothing)
        held_out = None
        if self.patience is not None and record:
            data, held_out = data.split(1 - HELD_OUT, derived_seed(run.seed, "held out"))

        def step(batch: Batch) -> StepResult:
            guided = guided_loss.prepare(batch)
            if change is not None:
                guided = guided._replace(batch=change(guided.batch))
            self.before_step(optimizer)
            result = self._step(model, optimizer, lambda: guided_loss(model, guided))
            if self.bn == "official" and self.official_statistics == "after":
                with torch.no_grad(), run.autocast(data.device):
                    run.forward(model, guided.batch)
            return result

        def validate() -> float:
            assert held_out is not None
            with kept_statistics(model):
                if self.bn == "recalibrate":
                    recalibrate(model, data.ordered(), run.forward)
                return run.accuracy(model, held_out)

        run.epochs(
            stage,
            model,
            data,
            step,
            optimizer,
            epochs=epochs,
            lr=lambda epoch: self.lr * self._decay(epoch / max(1, epochs)),
            validate=None if held_out is None else validate,
            patience=self.patience,
            record=record,
        )
        if self.bn == "recalibrate":
            recalibrate(model, data.ordered(), run.forward)

    def _decay(self, done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1.0

    def _step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, compute: Callable[[], StepResult]
    ) -> StepResult:
        moves = {"at_theta": "first", "official": self.official_statistics}.get(self.bn)

        def gradients(which: str) -> StepResult:
            with nullcontext() if which == moves else kept_statistics(model):
                result = compute()
                result.loss.backward()
            return result

        if self.bn == "frozen":
            for layer in batchnorms(model):
                layer.eval()
        optimizer.zero_grad()
        if not isinstance(optimizer, SharpOptimizer):
            result = gradients("first")
            check_finite_gradients(model.named_parameters())
            optimizer.step()
            return result
        at_theta = None
        if optimizer.needs_gradient:
            at_theta = gradients("first")
        elif moves == "first":
            with torch.no_grad():
                compute()
        perturbed = optimizer.step(lambda: gradients("perturbed"))
        return at_theta or perturbed


def moved(model: nn.Module, given: nn.Module, chosen: dict[str, Any], found: dict[str, Any]) -> Outcome:
    """The outcome of a method that resets no neuron: how far each one has moved."""
    scores = neuron_weight_change(model, given)
    return Outcome(scores, torch.zeros_like(scores.values, dtype=torch.bool), chosen, found)
