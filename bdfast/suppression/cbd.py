"""CBD: Causality-inspired Backdoor Defense (Zhang et al., CVPR 2023)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bdfast.data.batches import Batch, Batches
from bdfast.defenses.parts.classifier import classifier_of
from bdfast.suppression.base import Suppressed
from bdfast.suppression.dependence import Inputs, hsic
from bdfast.suppression.local_ascent import held_at
from bdfast.suppression.sample_losses import sample_losses, scored
from bdfast.suppression.sgd_training import SGDTraining, enough_epochs, plain_loss
from bdfast.task import at_least_float32
from bdfast.training import Run
from bdfast.training.copies import copy_of
from bdfast.training.modes import eval_mode

EPSILON = 1e-8
"""Of the published weights."""


def causal_weights(backdoored: Tensor, clean: Tensor) -> Tensor:
    """The weights [B] of the samples, of mean 1: l_B / (l_B + l_C + 1e-8), divided by the mean of these.

    A sample that the backdoored network has learned and the clean one has not weighs little.

    Args:
        backdoored: Losses l_B [B] of the backdoored network.
        clean: Losses l_C [B] of the clean one.
    """
    weights = shares(backdoored, clean)
    return weights / weights.mean().clamp(min=torch.finfo(weights.dtype).tiny)


def shares(backdoored: Tensor, clean: Tensor) -> Tensor:
    """The same before the division: [B] in [0, 1]."""
    return (backdoored / (backdoored + clean + EPSILON)).detach()


@dataclass(frozen=True)
class CBDSuppression(SGDTraining):
    """Causality-inspired training: a first network learns the backdoor, a second one learns what the first has not.

    The first is trained for a few epochs, in which a backdoor is learned. The second is trained on all samples, each
    with a weight that is small where the first network is right and the second one is not.

    The published rate of the first network falls by a schedule that the published code hands to the optimizer of the
    second; at its five epochs this makes no difference. The released code has no information term, and switches its
    dependence term off.

    Attributes:
        backdoor_epochs: Of the first network; left out, 5, or as many as make 200 updates.
        gamma: Holds the mean loss of the first network, as ABL does, so that it does not learn the task where that is
            easy or the epochs are many: the weights would then hang on the few samples that it does not know. Ours;
            None for the published training.
        epochs: Of the second; left out, 100, or as many as make 2,000 updates.
        dependence: Weight of a penalty on the dependence of the two networks' features before the classifier, as the
            HSIC of a batch, in place of the published estimate by a third network. Ours.
        information: Weight of a penalty on the mean squared length of these features, which bounds what they tell of
            the images: I(z; x) <= E |f(x)|^2 / 2 + const for z = f(x) + standard normal noise. Ours.
        ratio: Share of the samples that the result names as suspected: those with the least weights; at least one.
            Nothing is trained by it. Ours.
    """

    backdoor_epochs: int | None = None
    gamma: float | None = 0.5
    epochs: int | None = None
    dependence: float = 0.0
    information: float = 0.0
    ratio: float = 0.01

    paper: ClassVar[str] = "Zhang et al., Backdoor Defense via Deconfounded Representation Learning, CVPR 2023"
    drops: ClassVar[tuple[float, ...]] = (0.2, 0.7)
    PUBLISHED: ClassVar[dict[str, Any]] = {
        "backdoor_epochs": 5,
        "gamma": None,
        "epochs": 100,
        "schedule": "step",
        "weight_decay": 1e-4,
        "batch_size": 64,
    }
    """The released code; Wide ResNet 16-1 on CIFAR-10."""

    def __post_init__(self) -> None:
        for name, least in (("backdoor_epochs", 1), ("epochs", 1), ("dependence", 0), ("information", 0)):
            self.check_at_least(name, least)
        if self.gamma is not None:
            self.check_positive("gamma")
        self.check_share("ratio", most=0.5)
        super().__post_init__()

    def check(self, model: nn.Module, suspicious: Batches, run: Run) -> None:
        """See `Suppression.check`.

        Raises:
            ValueError: A penalty is asked for, and no linear layer gives the logits.
        """
        if self.dependence or self.information:
            classifier_of(model, suspicious, run)

    def run(self, model: nn.Module, suspicious: Batches, run: Run) -> Suppressed:
        """See `Suppression.run`."""
        size = len(suspicious), suspicious.batch_size
        first_epochs = self.backdoor_epochs or enough_epochs(5, 200, *size)
        epochs = self.epochs or enough_epochs(100, 2000, *size)
        backdoored = copy_of(model)
        self.train("backdoored", backdoored, suspicious, run, self._first, epochs=first_epochs, schedule="constant")
        backdoored.requires_grad_(False).eval()
        self._train_clean(model, backdoored, suspicious, run, epochs)

        def weigh(batch: Batch) -> tuple[Tensor, Tensor]:
            logits, targets = run.forward(model, batch)[:2]
            first = run.forward(backdoored, batch)[0]
            return shares(sample_losses(first, targets), sample_losses(logits, targets)), targets

        weights = scored([model, backdoored], suspicious, weigh)
        places = weights.lowest(max(1, int(self.ratio * len(suspicious))))
        return Suppressed(weights.indices[places], chosen={"backdoor_epochs": first_epochs, "epochs": epochs})

    def _first(self, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        return plain_loss(logits, targets, batch) if self.gamma is None else held_at(logits, targets, self.gamma)

    def _train_clean(self, model: nn.Module, backdoored: nn.Module, data: Batches, run: Run, epochs: int) -> None:
        with ExitStack() as stack, eval_mode(backdoored):
            seen: list[Inputs] = []
            if self.dependence or self.information:
                name = classifier_of(model, data, run)
                seen = [stack.enter_context(Inputs(net.get_submodule(name))) for net in (model, backdoored)]

            def objective(logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
                with torch.no_grad(), run.autocast(data.device):
                    first = run.forward(backdoored, batch)[0]
                losses = sample_losses(logits, targets)
                loss = (causal_weights(sample_losses(first, targets), losses) * losses).mean()
                if seen:
                    z, r = (at_least_float32(inputs.values).flatten(1) for inputs in seen)
                    loss = loss + self.information * z.square().sum(1).mean()
                    if self.dependence:
                        loss = loss + self.dependence * hsic(z, r)
                return loss

            self.train("clean", model, data, run, objective, epochs=epochs)
