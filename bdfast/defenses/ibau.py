"""i-BAU: unlearn one adversarial change for all images, with the gradient of how it answers to the weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bdfast.data.batches import Batch, Batches, with_images
from bdfast.defenses.distillation import DistillationLoss
from bdfast.defenses.loss import PreparedBatch
from bdfast.defenses.parts.unlearning import AdversarialUnlearning
from bdfast.defenses.stages import InRounds
from bdfast.inversion.universal import PACE, stepped
from bdfast.task import StepResult
from bdfast.training import Run
from bdfast.training.batchnorm import separate_statistics
from bdfast.training.modes import eval_mode
from bdfast.training.seeds import derived_seed

ASCENT_LR, INNER_LR, SHORTNESS = 10.0, 0.1, 0.001
"""Of the published code: the rate of the search for the change, that of the step in the fixed point, and the weight of
the change's squared length."""


@dataclass(frozen=True)
class IBAUDefense(AdversarialUnlearning, InRounds):
    """Zeng et al., "Adversarial unlearning of backdoors via implicit hypergradient" (ICLR 2022, arXiv 2110.03735).

    A minimax: one change for all images that raises the loss most, and weights that bear it. The change depends on the
    weights, and the gradient of the loss takes that into account: with a fixed point v of v = J v + g, where J is the
    derivative in the change of one step of its search and g that of the loss, it has the term (derivative of that step
    in the weights) v.

    Attributes:
        rounds: Searches for a change in a stage; published: 5.
        length: Largest length of the change, as root mean square of a pixel's and as a share of the range of the clean
            images; the published code has no limit.
        changed_share: Share of the images in a batch that get the change; published: 0.01.
        iterations: Steps of the fixed point (K); published: 5.
        compat: "official" does as the published code: the network in eval mode, a change that is found by plain
            gradient ascent and may leave the range, a fixed point that looks at the first batch alone, and Adam through
            all rounds.
    """

    paper: ClassVar[str] = "Zeng et al., ICLR 2022, arXiv 2110.03735"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "lr": 1e-4,
        "rounds": 5,
        "epochs": 1,
        "schedule": "constant",
        "weight_decay": 0.0,
        "distill": 0.0,
        "overlay": 0.0,
        "changed_share": 0.01,
        "bn": "frozen",
        "compat": "official",
        "batch_size": 256,
        "amp": False,
        "augment": None,
    }
    """The published run on CIFAR-10, as arguments of `purify`. Its images are augmented once, before all rounds."""

    updates: int = 60
    length: float = 0.1
    changed_share: float = 0.2
    iterations: int = 5

    rates: ClassVar[Sequence[float]] = (0.001, 0.003, 0.01)

    def __post_init__(self) -> None:
        self.check_share("length")
        self.check_share("changed_share")
        self.check_at_least("iterations", 1)
        super().__post_init__()

    def unlearn(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, stage: str, limits: tuple[float, float]
    ) -> None:
        """See `AdversarialUnlearning.unlearn`."""
        optimizer = self.optimizer(model, given)
        for index in range(self.rounds):
            name = f"{stage}, round {index + 1}"
            loss = self.distillation(ImplicitLoss, given, run, ibau=self, limits=limits)
            with eval_mode(model):
                loss.search(model, data, derived_seed(run.seed, name))
            self.fine_tune(model, given, data, run, name, optimizer=optimizer, loss=loss)


@dataclass(frozen=True)
class ImplicitLoss(DistillationLoss):
    """A loss whose gradient in the weights is the hypergradient.

    Attributes:
        ibau: The options.
        limits: Least and greatest pixel value.
        found: The change [C, H, W], and the batch of the fixed point, once `search` has been called.
    """

    ibau: IBAUDefense = field(kw_only=True)
    limits: tuple[float, float] = field(kw_only=True)
    found: dict[str, Any] = field(default_factory=dict)

    def search(self, model: nn.Module, images: Batches, seed: int) -> None:
        """One pass of gradient ascent over the images, from zero."""
        change: Tensor | None = None
        for batch in images.ordered() if self.ibau.compat else images.shuffled(seed):
            if change is None:
                change, first = torch.zeros_like(batch[0][0]), batch
            change.requires_grad_()
            with torch.no_grad():
                answers = self.outputs(model, batch)[0].argmax(-1)
            gradient = torch.autograd.grad(self._shortened(model, batch, answers, change), change)[0]
            change = self._moved(change.detach(), gradient)
        self.found.update(change=change, batch=first)

    def prepare(self, batch: Batch) -> PreparedBatch:
        """Draw which images get the change."""
        prepared = super().prepare(batch)
        count = len(batch[0])
        hit = torch.zeros(count, dtype=torch.bool)
        hit[torch.randperm(count)[: int(count * self.ibau.changed_share)]] = True
        return prepared._replace(beside=hit.to(batch[0].device).view(-1, 1, 1, 1))

    def __call__(self, model: nn.Module, prepared: PreparedBatch) -> StepResult:
        """The loss of `model` on the batch, a part of which has the change."""
        change = self.found["change"].detach().requires_grad_()
        images = prepared.batch[0]
        changed = torch.where(prepared.beside, self._changed(images, change), images)
        batch = self.found["batch"] if self.ibau.compat else prepared.batch
        with eval_mode(model) if self.ibau.compat else nullcontext():
            outer = super().__call__(model, prepared._replace(batch=with_images(prepared.batch, changed)))
            # Fused attention has no second derivative.
            with separate_statistics(model), sdpa_kernel(SDPBackend.MATH):
                shortened = self._shortened(model, batch, None, change)
        direct = torch.autograd.grad(outer.loss, change, retain_graph=True)[0]
        inner = torch.autograd.grad(shortened, change, create_graph=True)[0]
        moved = change - INNER_LR * inner
        fixed = torch.zeros_like(change)
        for _ in range(self.ibau.iterations):
            fixed = torch.autograd.grad(moved, change, fixed, retain_graph=True)[0] + direct
        # Adds nothing to the value, and the implicit term to the gradient in the weights.
        implicit = (moved * fixed).sum()
        return outer._replace(loss=outer.loss + implicit - implicit.detach())

    def _shortened(self, model: nn.Module, batch: Batch, answers: Tensor | None, change: Tensor) -> Tensor:
        logits, labels = self.outputs(model, with_images(batch, self._changed(batch[0], change)))
        error = F.cross_entropy(logits, labels if answers is None else answers)
        return SHORTNESS * change.square().sum() - error

    def _changed(self, images: Tensor, change: Tensor) -> Tensor:
        return images + change if self.ibau.compat else (images + change).clamp(*self.limits)

    def _moved(self, change: Tensor, gradient: Tensor) -> Tensor:
        if self.ibau.compat:
            return change - ASCENT_LR * gradient
        radius = self.ibau.length * (self.limits[1] - self.limits[0]) * change.numel() ** 0.5
        return stepped(change[None], gradient[None], radius, PACE)[0]
