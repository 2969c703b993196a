"""SAU: unlearn what small changes make the given and the current network get wrong alike."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdfast.data.batches import Batch, Batches, with_images
from bdfast.defenses.distillation import DistillationLoss
from bdfast.defenses.loss import PreparedBatch
from bdfast.defenses.parts.unlearning import AdversarialUnlearning
from bdfast.task import StepResult
from bdfast.training import Run
from bdfast.training.batchnorm import separate_statistics
from bdfast.training.modes import eval_mode

LEAST_SHARED, TINY = 1e-3, 1e-6
"""Of the published code: probabilities below the first count as none, and the second keeps logarithms finite."""


@dataclass(frozen=True)
class SAUDefense(AdversarialUnlearning):
    """Wei et al., "Shared adversarial unlearning: backdoor mitigation by unlearning shared adversarial examples"
    (NeurIPS 2023, arXiv 2307.10562).

    For each batch it looks for changes, no larger than `bound` in any pixel, that lead the given and the current
    network to the same wrong class, as a trigger does at first. The current network then learns, beside the clean
    images, to give such an image anything but the class that the given network gives it.

    Attributes:
        bound: Largest change of a pixel, as a share of the range of the clean images.
        steps: Steps of the search for a change.
        step_size: Length of a step, like `bound`.
        adversarial: Weight of the error of either network in the search (beta_1), beside their agreement (beta_2 = 1).
        shared: Weight of the loss on changed images (lambda_3), beside that on clean ones.
        compat: "official" does as the published code: Adam without a schedule, both networks in eval mode, changed
            pixels that may leave the range, and the loss with its clamps. The search goes on where the published one
            ends, once all changes of a batch are shared, and moves none of them any more.
    """

    paper: ClassVar[str] = "Wei et al., NeurIPS 2023, arXiv 2307.10562"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "lr": 1e-4,
        "epochs": 100,
        "schedule": "constant",
        "weight_decay": 0.0,
        "distill": 0.0,
        "overlay": 0.0,
        "bn": "frozen",
        "compat": "official",
        "batch_size": 256,
        "amp": False,
        "augment": None,
    }
    """The published run on CIFAR-10, as arguments of `purify`. It has a cosine schedule in its settings that it never
    steps."""

    bound: float = 0.2
    steps: int = 5
    step_size: float = 0.2
    adversarial: float = 0.01
    shared: float = 1.0

    rates: ClassVar[Sequence[float]] = (0.003, 0.01, 0.03)

    def __post_init__(self) -> None:
        self.check_share("bound")
        self.check_at_least("steps", 1)
        self.check_positive("step_size")
        self.check_at_least("adversarial", 0)
        self.check_at_least("shared", 0)
        super().__post_init__()

    def unlearn(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, stage: str, limits: tuple[float, float]
    ) -> None:
        """See `AdversarialUnlearning.unlearn`."""
        loss = self.distillation(SharedLoss, given, run, model=model, sau=self, limits=limits)
        self.fine_tune(model, given, data, run, stage, loss=loss)


@dataclass(frozen=True)
class SharedLoss(DistillationLoss):
    """The loss on clean images, and on changed ones that of the class that the given network answers there.

    Attributes:
        model: The network in training.
        sau: The options.
        limits: Least and greatest pixel value.
    """

    model: nn.Module = field(kw_only=True)
    sau: SAUDefense = field(kw_only=True)
    limits: tuple[float, float] = field(kw_only=True)

    def prepare(self, batch: Batch) -> PreparedBatch:
        """Find changed images, and what the given network answers there."""
        prepared = super().prepare(batch)
        with eval_mode(self.model), eval_mode(self.teacher):
            changed = self.search(batch)
            with torch.no_grad():
                plain, labels = self.outputs(self.teacher, batch)
                led_to = self.outputs(self.teacher, changed)[0].argmax(-1)
        fooled = (led_to != labels) & (led_to != plain.argmax(-1))
        return prepared._replace(beside=(changed, led_to, fooled))

    def __call__(self, model: nn.Module, prepared: PreparedBatch) -> StepResult:
        """The loss of `model` on the clean batch and the changed one."""
        changed, led_to, fooled = prepared.beside
        with eval_mode(model) if self.sau.compat else nullcontext():
            clean = super().__call__(model, prepared)
            with separate_statistics(model):  # those of clean images are what counts
                logits = self.outputs(model, changed)[0]
        shared = (self.avoided(logits, led_to) * fooled).mean()
        return clean._replace(loss=clean.loss + self.sau.shared * shared)

    def avoided(self, logits: Tensor, classes: Tensor) -> Tensor:
        """-log(1 - p) [B] of the probability p that logits [B, K] give to `classes` [B]."""
        if not self.sau.compat:
            others = logits.scatter(-1, classes[:, None], -torch.inf)
            return logits.logsumexp(-1) - others.logsumexp(-1)
        is_class = F.one_hot(classes, logits.shape[-1])
        probabilities = logits.softmax(-1)
        its, of_others = (probabilities * is_class).sum(-1), (probabilities * (1 - is_class)).sum(-1)
        first = torch.log(TINY + of_others.clamp(max=1 - LEAST_SHARED))
        return -(first + torch.log(1 + TINY - its.clamp(min=LEAST_SHARED))) / 2

    def search(self, batch: Batch) -> Batch:
        """The batch with changes for which both networks give the same wrong answer, as far as they are found."""
        images = batch[0]
        span = self.limits[1] - self.limits[0]
        bound, step = self.sau.bound * span, self.sau.step_size * span
        with torch.no_grad():
            plain = [self.outputs(network, batch)[0].argmax(-1) for network in (self.model, self.teacher)]
        change = torch.full_like(images, bound)
        for _ in range(self.sau.steps):
            change = self._within(images, change).requires_grad_()
            answers = [
                self.outputs(network, with_images(batch, images + change)) for network in (self.model, self.teacher)
            ]
            gradient = torch.autograd.grad(self._searched(answers, plain), change)[0]
            change = (change.detach() - step * gradient.sign()).clamp(-bound, bound)
        return with_images(batch, images + self._within(images, change))

    def _within(self, images: Tensor, change: Tensor) -> Tensor:
        return change if self.sau.compat else (images + change).clamp(*self.limits) - images

    def _searched(self, answers: list[tuple[Tensor, Tensor]], plain: list[Tensor]) -> Tensor:
        """What the search lowers: the divergence of the networks where they do not err alike, and less errors."""
        (ours, labels), (theirs, _) = answers
        wrong = [logits.argmax(-1) != before for (logits, _), before in zip(answers, plain, strict=True)]
        alike = wrong[0] & wrong[1] & (ours.argmax(-1) == theirs.argmax(-1))
        errors = [F.cross_entropy(logits, labels, reduction="none") for logits, _ in answers]
        missed = sum((error * ~led).mean() for error, led in zip(errors, wrong, strict=True))
        return (_divergence(ours, theirs) * ~alike).mean() - self.sau.adversarial * missed / 2


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon [B], of the answers in two sets of logits [B, K]."""
    p, q = (logits.softmax(-1).clamp(min=1e-8) for logits in (first, second))
    mixed = ((p + q) / 2).log()
    return (p * (p.log() - mixed) + q * (q.log() - mixed)).sum(-1) / 2
