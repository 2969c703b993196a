"""FT-SAM: fine-tuning with adaptive SAM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batches
from bdfast.defenses.distillation import Distilling
from bdfast.defenses.loss import FineTuningLoss
from bdfast.defenses.stages import Begun
from bdfast.inversion.surrogates import Surrogates
from bdfast.ops.lists import euclidean, norms
from bdfast.optim import SAM
from bdfast.optim.sharp_optimizer import Group
from bdfast.training import Run

EPS = 1e-12
PERIOD = 100
"""Steps in which the published code's cosine falls to zero; it then rises again for as many."""


@dataclass(frozen=True)
class FTSAMDefense(Distilling):
    """Zhu et al., "Enhancing fine-tuning based backdoor defense with sharpness-aware minimization" (ICCV 2023,
    arXiv 2304.11823).

    Fine-tuning with adaptive SAM: what a backdoor needs are weights of large norm, which plain fine-tuning hardly
    moves and which the adaptive perturbation moves most.

    Attributes:
        rho: Radius of the perturbation; published: 2. The files of settings for GTSRB and Tiny ImageNet say 8 and no
            label smoothing, but the published command line overrides them with its own defaults, 2 and 0.1, unless it
            is given others.
        adaptive: Perturb each weight in proportion to its square (ASAM).
        rho_min: What rho falls to, in proportion to the learning rate; left out, rho stays.
        surrogate_gap: The alpha of GSAM; published: 0.
        compat: "official" does as the published code: it restores the weights by subtraction, makes the learning rate a
            cosine of the steps with a half-period of 100 that begins anew, and smooths a label over the K - 1 wrong
            classes, eps / (K - 1) for each (its loss, a divergence, is smaller by a constant).
    """

    paper: ClassVar[str] = "Zhu et al., ICCV 2023, arXiv 2304.11823"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "rho": 2.0,
        "epochs": 100,
        "lr": 0.01,
        "distill": 0.0,
        "overlay": 0.0,
        "label_smoothing": 0.1,
        "bn": "official",
        "compat": "official",
        "batch_size": 256,
        "amp": False,
        "augment": Augmentation(shift=4, flip=True),
    }
    """The published run on CIFAR-10, as arguments of `purify`: `purify(..., method="ft_sam",
    **bdfast.FTSAMDefense.PUBLISHED)`. It has no flip on other data sets, and 50 epochs on GTSRB. The order of the
    batches and what is drawn for the augmentation are not those of the published code. That also draws its clean set,
    equally many images of each class; give such a set."""

    rho: float = 1.0
    adaptive: bool = True
    rho_min: float | None = None
    surrogate_gap: float = 0.0
    compat: Literal["official"] | None = None

    rates: ClassVar[Sequence[float]] = (0.01, 0.03, 0.1, 0.2)
    unsuspected: ClassVar[int | None] = 3

    def __post_init__(self) -> None:
        self.check_at_least("rho", 0)
        self.check_at_least("rho_min", 0)
        super().__post_init__()

    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """See `Staged.begin`."""
        return Begun(lambda options, images, stage: options.fine_tune(model, given, images, run, stage))

    def optimizer(self, model: nn.Module, given: nn.Module) -> SAM:
        """SGD with the gradient of the perturbed weights."""
        return (_SubtractingSAM if self.compat else SAM)(
            model.named_parameters(),
            torch.optim.SGD,
            rho=self.rho,
            adaptive=self.adaptive,
            surrogate_gap=self.surrogate_gap,
            lr=self.rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def loss(self, given: nn.Module, run: Run) -> FineTuningLoss:
        """What is minimised; `compat` smooths labels over the wrong classes alone."""
        loss = super().loss(given, run)
        return replace(loss, spread="wrong") if self.compat else loss

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The learning rate of `compat`, and the radius that goes with the learning rate."""
        for group in optimizer.param_groups:
            if self.compat:
                done = group.setdefault("steps", 0)
                group["lr"] = self.rate * (1 + math.cos(math.pi * done / PERIOD)) / 2
                group["steps"] = done + 1
            if self.rho_min is not None:
                group["rho"] = self.rho_min + (self.rho - self.rho_min) * group["lr"] / self.rate


class _SubtractingSAM(SAM):
    """Restores the weights by subtracting the perturbation, which loses the last bits of some."""

    def _perturb(self, moving: list[tuple[Group, Tensor]]) -> bool:
        weighted = [self._direction(x) * (x.abs() if group["adaptive"] else 1) for group, x in moving]
        norm = euclidean(norms(weighted))
        self._taken: list[tuple[Tensor, Tensor]] = []
        self._weights.save([param for _, param in moving])
        for group, param in moving:
            step = (param.square() if group["adaptive"] else 1) * self._direction(param) * (group["rho"] / (norm + EPS))
            param.add_(step)
            self._taken.append((param, step))
        return bool(norm.isfinite())

    def _update(self, stepping: list[tuple[Group, Tensor]]) -> None:
        for param, step in self._taken:
            param.sub_(step)
        self._weights.save([param for param, _ in self._taken])
        super()._update(stepping)
