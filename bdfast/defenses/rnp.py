"""RNP: unlearn the clean images, recover them with a mask on every channel, and prune what the masks switch off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from bdfast import task
from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batch, Batches
from bdfast.defenses.parts.forgetting import MOMENTUM, Forgetting
from bdfast.defenses.parts.masks import MaskedNetwork, channels_of, mask_scores, masked_at_most, thresholds_of
from bdfast.defenses.pruning import Pruning
from bdfast.neurons import NeuronScores
from bdfast.ops.finite import check_finite_gradients
from bdfast.task import StepResult
from bdfast.training import Run
from bdfast.training.budget import Budget, budget

OFFICIAL_EPOCHS = 20
"""Epochs of the recovery in the published code."""

OFFICIAL_DECIMALS = 4
"""With which the published code stores its masks before it compares them."""


@dataclass(frozen=True)
class RNPDefense(Forgetting, Pruning):
    """Li et al., "Reconstructive neuron pruning for backdoor defense" (ICML 2023, arXiv 2305.14876).

    The clean images are unlearned in a copy, all of whose weights move. Then its weights stay, and a mask in [0, 1] on
    every channel is trained so that the copy is right on clean images again. Channels whose masks come near 0 are of no
    use for clean images, and are pruned in the original.

    A channel is an element of the scale of BatchNorm, and of other normalisation layers; in a network without these it
    is an output unit of a convolution or linear layer (both ours). Pruned channels keep their biases, as published.

    Attributes:
        threshold: The mask up to which a channel goes. Left out, it is chosen on held-out images. The published code
            goes from 0 to 0.9 in steps of 0.05 and looks at triggered test images; BackdoorBench takes 0.7.
        unlearn_lr: Learning rate of the ascent; published: 0.01.
        unlearn_to: What unlearning leaves of the accuracy beyond that of a constant answer, as a share. Published:
            about 0.12, from where no masks led back to the clean images on our tuning networks.
        recover_lr: Learning rate of the masks. Published: 0.2 with a loss that is multiplied by 0.2, which together are
            0.04; on our tuning networks that took a third of all masks to 0, where none can be told from another.
        recover_updates: Updates of the masks, about; published: 20 epochs, which are 80 in batches of 128 of 500
            images.
        compat: "official" does as the published code. It recovers for 20 epochs in batches as they are handed in,
            whatever `recover_updates`, and compares masks rounded to 4 decimals. It unlearns until an epoch, as its
            steps saw it, has an accuracy of at most 0.2, whatever `unlearn_to`, at a tenth of the learning rate after
            10 and again after 20 epochs, and goes on with what it has where `unlearn_epochs` do not get there.
    """

    paper: ClassVar[str] = "Li et al., ICML 2023, arXiv 2305.14876"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "unlearn_lr": 0.01,
        "unlearn_epochs": 21,
        "recover_lr": 0.04,
        "bn": "frozen",
        "compat": "official",
        "batch_size": 128,
        "amp": False,
        "augment": Augmentation(shift=4, flip=True),
    }
    """The published run on CIFAR-10, as arguments of `purify`; the threshold is not among them, as the published code
    tries nineteen and chooses none: `purify(..., method="rnp", threshold=0.3, **bdfast.RNPDefense.PUBLISHED)`. Its
    epochs of unlearning are numbered from 0 to 20."""

    unlearn_lr: float = 1e-3
    unlearn_to: float = 0.5
    threshold: float | None = None
    recover_lr: float = 0.004
    recover_updates: int = 80

    strength = "threshold"

    def __post_init__(self) -> None:
        if self.threshold is not None:
            self.check_share("threshold")
        self.check_positive("recover_lr")
        self.check_at_least("recover_updates", 1)
        super().__post_init__()

    def rank(self, model: nn.Module, data: Batches, run: Run) -> NeuronScores:
        """1 - mask of every channel; see `Pruning.rank`.

        Raises:
            ValueError: There are no channels, or the model is no better than a constant answer.
            RuntimeError: Unlearning did not get as far as it should.
        """
        index = channels_of(model, data, run)
        masked = MaskedNetwork(self.forgetful(model, data, run), index)
        self.recover(masked, data, run)
        masks = masked.masks.detach()
        if self.compat:
            masks = masks.double().round(decimals=OFFICIAL_DECIMALS)
        return mask_scores(masks, index)

    def chosen(self, scores: NeuronScores, strength: float) -> torch.Tensor:
        """The channels whose masks are at most `strength`; see `Pruning.chosen`."""
        return masked_at_most(scores, strength)

    def strengths(self, scores: NeuronScores) -> list[float]:
        """See `Pruning.strengths`."""
        return thresholds_of(scores)

    def recover(self, masked: MaskedNetwork, data: Batches, run: Run) -> None:
        """Train the masks, in place."""
        length = budget(self.recover_updates, len(data))
        if self.compat:
            length = Budget(OFFICIAL_EPOCHS, data.batch_size)
        optimizer = torch.optim.SGD([masked.masks], lr=self.recover_lr, momentum=MOMENTUM)

        def step(batch: Batch) -> StepResult:
            optimizer.zero_grad()
            logits, targets = masked.outputs(run, batch, masked.masks)
            loss = task.cross_entropy(logits, targets)
            loss.backward()
            check_finite_gradients([("masks", masked.masks)])
            optimizer.step()
            masked.clamp()
            return task.measured(loss, logits, targets)

        run.epochs("recover", masked, data.in_batches_of(length.batch_size), step, optimizer, epochs=length.epochs)
