"""PAM: fine-tuning with gradients at weights moved towards the backdoored ones, on images with an inverted trigger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batch, Batches
from bdfast.defenses.distillation import Distilling
from bdfast.defenses.stages import Begun, InRounds
from bdfast.inversion import BTIDBF, Inversion
from bdfast.inversion.surrogates import Surrogates
from bdfast.optim import PAM
from bdfast.training import Run
from bdfast.training.batchnorm import Policy


@dataclass(frozen=True)
class PAMDefense(Distilling, InRounds):
    """Min et al., "Uncovering, explaining, and mitigating the superficial safety of backdoor defense" (NeurIPS 2024,
    arXiv 2410.09838): PAM.

    A trigger is inverted with BTI-DBF. Then the network is fine-tuned on clean images, a part of them with that trigger
    and their true labels, with gradients at weights that are moved towards the backdoored ones. So the loss is small
    there too, and a few steps do not restore the backdoor.

    Attributes:
        rho: Length of the move towards the backdoored weights, in their units; published: 0.5.
        rounds: How often inversion and fine-tuning take turns; the generator goes on learning in each, on the network
            as it then is; published: 3.
        epochs: Epochs of the fine-tuning in each round, if not as many as make `updates` in a stage; published: 30.
        lr: As in every method that trains in stages; published: 0.01.
        momentum: Of SGD; published: 0.1.
        weight_decay: L2 penalty; published: none.
        triggered_share: Share of the images in a batch that get the inverted trigger; published: 0.2.
        target: The label that the trigger leads to, where it is known; found by the inversion otherwise.
        invert_epochs: Epochs of the generator in each round; published: 30.
        compat: "official" does as the published code: it inverts as `bdfast.BTIDBF.PUBLISHED` says, leaves the
            generator as the first round made it, which that code does unintentionally, and keeps one SGD with its
            momentum through all rounds.
    """

    paper: ClassVar[str] = "Min et al., NeurIPS 2024, arXiv 2410.09838"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "rho": 0.5,
        "rounds": 3,
        "epochs": 30,
        "lr": 0.01,
        "schedule": "constant",
        "momentum": 0.1,
        "triggered_share": 0.2,
        "distill": 0.0,
        "overlay": 0.0,
        "invert_epochs": 30,
        "bn": "official",
        "compat": "official",
        "batch_size": 128,
        "amp": False,
        "augment": Augmentation(shift=4, flip=True),
    }
    """The run of the published script for CIFAR-10, as arguments of `purify`: `purify(..., method="pam",
    **bdfast.PAMDefense.PUBLISHED)`. The order of the batches, and what is drawn for the augmentation and for the
    triggered images, are not those of the published code."""

    updates: int = 60
    rho: float = 0.15
    rounds: int = 2
    weight_decay: float = 0.0
    triggered_share: float = 0.1
    target: int | None = None
    invert_epochs: int = 4
    bn: Policy = "recalibrate"
    compat: Literal["official"] | None = None

    rates: ClassVar[Sequence[float]] = (0.003, 0.01, 0.03, 0.1)
    unsuspected: ClassVar[int | None] = 2
    official_statistics = "perturbed"

    def __post_init__(self) -> None:
        self.check_at_least("rho", 0)
        self.check_share("triggered_share")
        self.check_at_least("invert_epochs", 1)
        super().__post_init__()

    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """Invert a trigger; see `Staged.begin`."""
        published = BTIDBF.PUBLISHED if self.compat else {}
        inverter = BTIDBF(**{**published, "target": self.target, "epochs": self.invert_epochs})
        inversion = first = inverter.run(given, data, run)
        fresh = True  # no training since the inversion

        def train(options: PAMDefense, images: Batches, stage: str) -> None:
            nonlocal inversion, fresh
            # A round that was finished before a kill loads its optimizer as well, so that the next goes on from there.
            optimizer = options.optimizer(model, given) if self.compat else None
            for index in range(self.rounds):
                name = f"{stage}, round {index + 1}" if index else stage
                if not self.compat and not fresh:
                    inversion = inverter.run(model, images, run, f"invert before {name}", start=inversion)
                options.fine_tune(
                    model, given, images, run, name, optimizer=optimizer, change=self._triggering(inversion)
                )
                fresh = False

        def restart() -> None:
            nonlocal inversion, fresh
            inversion, fresh = first, True

        return Begun(train, found={"target": first.target, "evidence": first.evidence}, restart=restart)

    def optimizer(self, model: nn.Module, given: nn.Module) -> PAM:
        """SGD with the gradient at weights moved towards `given`."""
        return PAM(
            model.named_parameters(),
            torch.optim.SGD,
            reference=given.parameters(),
            rho=self.rho,
            lr=self.rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def _triggering(self, inversion: Inversion) -> Callable[[Batch], Batch]:
        """Puts the inverted trigger on some images of a batch; their labels stay."""

        def change(batch: Batch) -> Batch:
            images, *rest = batch
            # Rounded up as in the published code; a share of zero is none.
            count = int(self.triggered_share * len(images) + 1) if self.triggered_share else 0
            chosen = torch.randperm(len(images), device=images.device)[:count]
            with torch.no_grad():
                changed = inversion.generator(images[chosen]).to(images.dtype)
            return (images.index_copy(0, chosen, changed), *rest)

        return change
