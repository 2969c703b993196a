"""What the defenses share that fine-tune on the clean set: their options, and the loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from bdfast.data.batches import Batch, Batches
from bdfast.defenses.base import Defense
from bdfast.defenses.loss import FineTuningLoss
from bdfast.ops.finite import check_finite_gradients
from bdfast.optim import SharpOptimizer
from bdfast.task import StepResult
from bdfast.training import Run
from bdfast.training.batchnorm import Policy, batchnorms, kept_statistics, recalibrate
from bdfast.training.seeds import derived_seed

Schedule = Literal["cosine", "constant"]

HELD_OUT = 0.1
"""Share of the clean images that `patience` looks at."""


@dataclass(frozen=True)
class FineTuning(Defense):
    """Fine-tuning on clean images, with SGD or the optimizer that a subclass chooses.

    Attributes:
        epochs: Epochs of the fine-tuning; has to be settled before it begins, like `lr`.
        lr: Learning rate in its first epoch.
        schedule: How it falls from epoch to epoch: "cosine", to zero, or "constant".
        momentum: Of SGD.
        weight_decay: L2 penalty.
        label_smoothing: Share of the label that is spread over all classes.
        bn: Which pass moves the BatchNorm statistics; see `bdfast.training.batchnorm.Policy`.
        patience: Set a tenth of the clean images aside, and end after this many epochs without a new best accuracy on
            them; left out, all images are used in all epochs.
    """

    epochs: int | None = None
    lr: float | None = None
    schedule: Schedule = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    bn: Policy = "at_theta"
    patience: int | None = None

    official_statistics: ClassVar[Literal["first", "perturbed", "after"]] = "first"
    """The pass that moves the BatchNorm statistics in the published code: `bn="official"`."""

    def __post_init__(self) -> None:
        if self.lr is not None:
            self.check_positive("lr")
        self.check_share("label_smoothing", most=0.9)
        self.check_share("momentum")
        self.check_at_least("epochs", 0)
        self.check_at_least("patience", 1)
        super().__post_init__()

    @property
    def rate(self) -> float:
        """The learning rate, once it is settled."""
        assert self.lr is not None
        return self.lr

    def optimizer(self, model: nn.Module, given: nn.Module) -> torch.optim.Optimizer:
        """What moves the weights of `model`: SGD, where a subclass says nothing else; `given` is the original model."""
        params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.SGD(params, lr=self.rate, momentum=self.momentum, weight_decay=self.weight_decay)

    def loss(self, given: nn.Module, run: Run) -> FineTuningLoss:
        """What is minimised; `given` is the original model."""
        return FineTuningLoss(run, self.label_smoothing)

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
        optimizer: torch.optim.Optimizer | None = None,
        loss: FineTuningLoss | None = None,
        change: Callable[[Batch], Batch] | None = None,
        after: Callable[[], None] | None = None,
        record: bool = True,
    ) -> None:
        """The loop, in place.

        Args:
            model: What is trained.
            given: The original model.
            data: Clean images.
            run: Seed, precision, progress, history and checkpoints.
            stage: Name of the stage in these.
            optimizer: Goes on from where it is, with its momentum; a new one when left out.
            loss: What is minimised, if not that of the options.
            change: Applied to each batch once the loss has prepared it.
            after: Called after every update, such as a projection of the weights.
            record: Put the epochs into the history.
        """
        assert self.epochs is not None
        epochs = self.epochs
        optimizer = self.optimizer(model, given) if optimizer is None else optimizer
        loss = self.loss(given, run) if loss is None else loss
        held_out = None
        if self.patience is not None and record:
            data, held_out = data.split(1 - HELD_OUT, derived_seed(run.seed, "held out"))

        def step(batch: Batch) -> StepResult:
            prepared = loss.prepare(batch)
            if change is not None:
                prepared = prepared._replace(batch=change(prepared.batch))
            self.before_step(optimizer)
            result = self._step(model, optimizer, lambda: loss(model, prepared))
            if after is not None:
                after()
            if self.bn == "official" and self.official_statistics == "after":
                with torch.no_grad(), run.autocast(data.device):
                    run.forward(model, prepared.batch)
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
            lr=lambda epoch: self.rate * self._decay(epoch / max(1, epochs)),
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
