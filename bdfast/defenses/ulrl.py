"""ULRL: draw the rows of the classifier anew that unlearning changes most, and relearn away from what they were."""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdfast import task
from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batch, Batches
from bdfast.defenses.loss import FineTuningLoss, PreparedBatch
from bdfast.defenses.parts.classifier import trained_classifier
from bdfast.defenses.parts.forgetting import Forgetting
from bdfast.defenses.stages import Begun, Staged
from bdfast.inversion.surrogates import Surrogates
from bdfast.neurons import NeuronIndex, NeuronScores, neuron_weight_change
from bdfast.task import StepResult
from bdfast.training import Run
from bdfast.training.seeds import derived_seed

LEAST_ROWS = 3
"""Of two rows the median is one and the other is always an outlier."""


@dataclass(frozen=True)
class ULRLDefense(Forgetting, Staged):
    """Min et al., "Unified neural backdoor removal with only few clean samples through unlearning and relearning"
    (arXiv 2405.14781).

    The clean images are unlearned in a copy. The rows of the classifier that this changed far more than the others
    (median absolute deviation) are drawn anew in the original, which is then fine-tuned with a penalty on the cosine
    between each such row and what it was. Where no row stands out, it is fine-tuned alone.

    Attributes:
        most_rows: Most rows that are drawn anew: those that changed most (ours; published: those of the first classes,
            and two as here).
        alpha: Weight of the penalty. It is the cosine as far as that is above 0 (ours); the published one goes on to
            -1, and then asks of a row to be the opposite of what it was. Published: 0.7 on CIFAR-10, which left
            more than twice as much of a patch on a tuning network, and 0.001 on CIFAR-100, GTSRB and Tiny ImageNet.
        compat: "official" does as the published code, which takes the first rows that stand out, also of two, and the
            cosine as it is. It unlearns until an epoch, as its steps saw it, has an accuracy of at most 0.2, whatever
            `unlearn_to`, at a tenth of the learning rate after 10 and again after 20 epochs, and goes on with what it
            has where `unlearn_epochs` do not get there.
        weight_decay: L2 penalty of the relearning, as published; that of the ascent is 5e-4.
        bn: As in every method; "official" moves the statistics twice in a step, before and after the update.
    """

    paper: ClassVar[str] = "Min et al., arXiv 2405.14781"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "unlearn_epochs": 20,
        "alpha": 0.7,
        "lr": 0.005,
        "epochs": 20,
        "bn": "official",
        "compat": "official",
        "batch_size": 128,
        "amp": False,
        "augment": Augmentation(shift=4, flip=True),
    }
    """The published run on CIFAR-10, as arguments of `purify`. On the other data sets the learning rate is 0.001, like
    alpha. The published code computes in float16."""

    most_rows: int = 2
    alpha: float = 3.0
    weight_decay: float = 0.0

    rates: ClassVar[Sequence[float]] = (0.01, 0.03, 0.1)
    longest_gradient = 20.0

    def __post_init__(self) -> None:
        self.check_at_least("most_rows", 1)
        self.check_at_least("alpha", 0)
        super().__post_init__()

    def check(self, model: nn.Module, clean: Batches, run: Run) -> None:
        """Refuse a classifier whose rows cannot be drawn anew; see `Defense.check`."""
        super().check(model, clean, run)
        trained_classifier(model, clean, run)

    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """Unlearn, and draw the rows anew that stand out; see `Staged.begin`."""
        classifier, layer = trained_classifier(model, data, run)
        index = NeuronIndex(model, include=glob.escape(classifier))
        scores = neuron_weight_change(self.forgetful(model, data, run), model, index=index)
        rows = self.outlying(scores)
        neurons = torch.zeros(len(scores), dtype=torch.bool, device=layer.weight.device)
        neurons[rows] = True
        before = task.at_least_float32(layer.weight.detach()[neurons])
        _draw_anew(layer, neurons, derived_seed(run.seed, "rows"))

        def train(options: ULRLDefense, images: Batches, stage: str) -> None:
            loss = RelearningLoss(
                run, options.label_smoothing, classifier=classifier, rows=neurons, before=before, options=options
            )
            options.relearn(model, given, images, run, stage, loss)

        return Begun(train, scores, neurons, {"rows": rows})

    def outlying(self, scores: NeuronScores) -> list[int]:
        """The rows that are drawn anew, the one that changed most first."""
        outliers = scores.outliers().tolist()
        if self.compat:
            return [row for row, is_outlier in enumerate(outliers) if is_outlier][: self.most_rows]
        if len(scores) < LEAST_ROWS:
            return []
        return [row for row in scores.ranking().tolist() if outliers[row]][: self.most_rows]

    def relearn(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, stage: str, loss: RelearningLoss
    ) -> None:
        """Train `model` in place for one stage."""
        if self.bn != "official":
            self.fine_tune(model, given, data, run, stage, loss=loss)
            return
        current: list[Batch] = []

        def keep(batch: Batch) -> Batch:
            current[:] = [batch]
            return batch

        def pass_again() -> None:
            with torch.no_grad():
                run.forward(model, current[0])

        self.fine_tune(model, given, data, run, stage, loss=loss, change=keep, after=pass_again)


@dataclass(frozen=True)
class RelearningLoss(FineTuningLoss):
    """Cross-entropy, and the penalty on rows of the classifier that are as they were.

    Attributes:
        classifier: Name of the layer.
        rows: [K] bool.
        before: [rows, inputs], what these were.
        options: The weight of the penalty, and its form.
    """

    classifier: str = field(kw_only=True)
    rows: Tensor = field(kw_only=True)
    before: Tensor = field(kw_only=True)
    options: ULRLDefense = field(kw_only=True)

    def __call__(self, model: nn.Module, prepared: PreparedBatch) -> StepResult:
        """See `FineTuningLoss.__call__`."""
        result = super().__call__(model, prepared)
        return result._replace(loss=result.loss + self.options.alpha * self.likeness(model))

    def likeness(self, model: nn.Module) -> Tensor:
        """The sum [] of the cosines; 0 for a row that was zero."""
        weight = model.get_submodule(self.classifier).get_parameter("weight")
        cosines = F.cosine_similarity(task.at_least_float32(weight[self.rows]), self.before, dim=1)
        return (cosines if self.options.compat else cosines.relu()).sum()


@torch.no_grad()
def _draw_anew(layer: nn.Linear, rows: Tensor, seed: int) -> None:
    """Rows [K], bool, uniform up to the root of 2 / inputs, as the published code has it; their biases are 0, unless
    they are frozen."""
    weight, inputs = layer.weight, layer.in_features
    draws = torch.Generator().manual_seed(seed)
    drawn = 2 * torch.rand(int(rows.sum()), inputs, dtype=torch.float64, generator=draws) - 1
    weight[rows] = (math.sqrt(2 / inputs) * drawn).to(weight)
    bias = layer._parameters.get("bias")
    if bias is not None and bias.requires_grad:
        bias[rows] = 0
