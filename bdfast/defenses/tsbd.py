"""TSBD: zero what unlearning changes most, then fine-tune with a penalty on the gradient norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batches
from bdfast.defenses.distillation import Distilling
from bdfast.defenses.fine_tuning import Schedule
from bdfast.defenses.parts.ascent import unlearned, unlearned_as_published
from bdfast.defenses.parts.trainable import trainable
from bdfast.defenses.stages import Begun
from bdfast.inversion.surrogates import Surrogates
from bdfast.neurons import NeuronIndex, neuron_weight_change, reinitialize
from bdfast.ops import Scope
from bdfast.optim import GradientNorm
from bdfast.training import Epoch, Run

OFFICIAL_STOP = 0.1
"""Accuracy at which the published code ends unlearning, whatever the number of classes."""


@dataclass(frozen=True)
class TSBDDefense(Distilling):
    """Lin et al., "Unveiling and mitigating backdoor vulnerabilities based on unlearning weight changes and backdoor
    activeness" (NeurIPS 2024, arXiv 2405.20291).

    Stage 1 unlearns the clean data in a copy (gradient ascent), zeroes in the original the sub-weights that this
    changed most in the neurons that it changed most; stage 2 fine-tunes with a penalty on the gradient norm.

    Attributes:
        n: Share of the neurons to reinitialise, in (0, 1]; the published code tries eleven values.
        m: Share of their sub-weights to zero, in (0, 1].
        unlearn_lr: Learning rate of the ascent; published: 1e-4.
        unlearn_to: What unlearning leaves of the accuracy beyond that of a constant answer, as a share; published: 0.
            What moves once accuracy collapses says little about the neurons (docs/choosing-strength.md).
        unlearn_epochs: Most epochs of ascent, as published; it ends within the epoch that reaches `unlearn_to`.
        epochs: Epochs of a stage, if not as many as make `updates`; published: 21, numbered from 0 to 20.
        lr: As in every method that trains in stages; published: 0.01.
        schedule: How it falls from epoch to epoch: "cosine", to zero, or "constant", as published.
        weight_decay: L2 penalty of the fine-tuning; published: none.
        rho: Radius of the perturbation at which the second gradient is taken.
        alpha: Share of the second gradient; the penalty is alpha * rho * ||gradient||.
        scope: Radius for the gradient of every tensor by itself ("tensor", as in the published code, which left less of
            the backdoor in every comparison that we made), or of the whole model ("global", as in the paper's formula).
        layers: Kind of the neurons to rank: "auto", "conv" (as published), "linear" or "attention".
        compat: "official" does as the published code. It ranks neurons by their weight change rounded to 4 decimals,
            and leaves out only those shortcuts whose name says "shortcut". It reads the images in their own order. It
            unlearns until at most a tenth of them, augmented and in eval mode, is right after an epoch, whatever
            `unlearn_to`, and goes on to the next stage where `unlearn_epochs` do not get there. One thing differs: a
            gradient of zero moves nothing, where the published code divides by it.
    """

    paper: ClassVar[str] = "Lin et al., NeurIPS 2024, arXiv 2405.20291"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "unlearn_lr": 1e-4,
        "unlearn_to": 0.0,
        "lr": 0.01,
        "schedule": "constant",
        "epochs": 21,
        "distill": 0.0,
        "overlay": 0.0,
        "bn": "official",
        "layers": "conv",
        "compat": "official",
        "batch_size": 256,
        "amp": False,
        "augment": Augmentation(shift=4, flip=True),
    }
    """The published run on CIFAR-10, as arguments of `purify`; n is not among them, as the published code tries eleven
    and chooses none: `purify(..., n=0.2, **bdfast.TSBDDefense.PUBLISHED)`. It has no flip on other data sets. What is
    drawn for the augmentation is not what the published code draws."""

    n: float = 0.1
    m: float = 0.7
    unlearn_lr: float = 1e-3
    unlearn_to: float = 0.5
    unlearn_epochs: int = 1000
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    rho: float = 0.05
    alpha: float = 0.7
    scope: Scope = "tensor"
    layers: str = "auto"
    compat: Literal["official"] | None = None

    scored_by: ClassVar[str] = "weight change while unlearning (sum of |Δw|)"
    neurons_are: ClassVar[str] = "reinitialised"
    rates: ClassVar[Sequence[float]] = (0.01, 0.03, 0.1, 0.2)
    unsuspected: ClassVar[int | None] = 3
    official_statistics = "after"

    def __post_init__(self) -> None:
        for name in ("n", "m"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], got {value}; 0.15 takes 15 %.")
        self.check_positive("unlearn_lr")
        self.check_share("unlearn_to", most=0.9)
        super().__post_init__()

    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """Unlearn, and zero what that changed most; see `Staged.begin`."""
        clean = data.unshuffled() if self.compat else data
        index = trainable(NeuronIndex.in_scope(model, self.layers, compat=self.compat), model)
        forgetful = self.unlearn(model, clean, run)
        scores = neuron_weight_change(forgetful, model, index=index)
        if not scores.values.max() > scores.values.min():
            raise ValueError(
                f"model: expected neurons that unlearning changes in different degree, got {len(scores)} that it "
                "changed alike, so that none can be told from the others; raise unlearn_lr, or choose other layers."
            )
        zeroed = reinitialize(model, scores, n=self.n, m=self.m, changed=(forgetful, given), compat=self.compat)

        def train(options: TSBDDefense, images: Batches, stage: str) -> None:
            options.fine_tune(model, given, images.unshuffled() if self.compat else images, run, stage)

        return Begun(train, scores, zeroed.neurons)

    def optimizer(self, model: nn.Module, given: nn.Module) -> GradientNorm:
        """SGD with the penalty on the gradient norm."""
        return GradientNorm(
            model.named_parameters(),
            torch.optim.SGD,
            rho=self.rho,
            alpha=self.alpha,
            scope=self.scope,
            lr=self.rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def unlearn(self, model: nn.Module, clean: Batches, run: Run) -> nn.Module:
        """A copy of `model` after gradient ascent on the clean data, as far as `unlearn_to` or `compat` says."""
        ascent = partial(torch.optim.SGD, lr=self.unlearn_lr, momentum=self.momentum, maximize=True)
        if not self.compat:
            return unlearned(model, clean, run, ascent, to=self.unlearn_to, epochs=self.unlearn_epochs)

        def ended(copy: nn.Module, epoch: Epoch) -> bool:
            return run.accuracy(copy, clean, augmented=True) <= OFFICIAL_STOP

        return unlearned_as_published(model, clean, run, ascent, ended=ended, epochs=self.unlearn_epochs)
