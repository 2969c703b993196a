"""ANP: prune the channels that the network can least do with when an adversary shifts their scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batch, Batches
from bdfast.defenses.parts.masks import MaskedNetwork, channels_of, mask_scores, masked_at_most, thresholds_of
from bdfast.defenses.pruning import Pruning
from bdfast.neurons import NeuronScores
from bdfast.ops.finite import check_finite_gradients
from bdfast.task import StepResult
from bdfast.training import Run
from bdfast.training.budget import budget
from bdfast.training.copies import copy_of

STAGE = "masks"

MOMENTUM = 0.9

DECIMALS = 4
"""With which the published code stores its masks before it compares them."""


@dataclass(frozen=True)
class ANPDefense(Pruning):
    """Wu and Wang, "Adversarial neuron pruning purifies backdoored deep models" (NeurIPS 2021, arXiv 2110.14430).

    A backdoored network is easily led astray by changes of the scales and biases of its normalisation layers. For each
    batch such changes are found by gradient ascent, and masks in [0, 1] on the scales are trained to keep the clean
    images right with and without them: a scale is gamma (m + delta), a bias beta (1 + xi). The channels with the
    lowest masks lose their scales; the weights of the network are never trained.

    In a network without normalisation scales the masks lie on the output units of its layers (ours).

    Attributes:
        threshold: Largest mask of a channel that goes; published: 0.2. Left out, it is chosen on held-out images.
        updates: Updates of the masks, about; published: 2000, with batches of 128.
        lr: Learning rate of the masks; the original has 0.2, BackdoorBench 0.01.
        bound: Largest delta and xi.
        steps: Steps of the ascent, each of length `bound` / `steps` from a random start.
        clean_share: Weight of the loss without the changes; that with them has the rest.
        compat: "official" does as the published code: delta and xi are not brought back to the bound after a step, so
            that they come up to twice as far, and masks are compared with four decimals.
    """

    paper: ClassVar[str] = "Wu and Wang, NeurIPS 2021, arXiv 2110.14430"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "threshold": 0.2,
        "updates": 2000,
        "bn": "frozen",
        "compat": "official",
        "amp": False,
    }
    """The published run on CIFAR-10, as arguments of `purify`. Its code draws images with replacement and shifts and
    mirrors them."""

    threshold: float | None = None
    updates: int = 300
    lr: float = 0.2
    bound: float = 0.4
    steps: int = 1
    clean_share: float = 0.2
    compat: Literal["official"] | None = None

    scored_by: ClassVar[str] = "how far its mask is below 1"
    strength = "threshold"

    def __post_init__(self) -> None:
        if self.threshold is not None:
            self.check_share("threshold")
        self.check_at_least("updates", 1)
        self.check_positive("lr")
        self.check_positive("bound")
        self.check_at_least("steps", 1)
        self.check_share("clean_share")
        super().__post_init__()

    def rank(self, model: nn.Module, data: Batches, run: Run) -> NeuronScores:
        """See `Pruning.rank`: 1 - m."""
        masked = self.trained(model, data, run)
        masks = masked.masks.detach()
        return mask_scores(masks.double().round(decimals=DECIMALS) if self.compat else masks, masked.index)

    def chosen(self, scores: NeuronScores, strength: float) -> Tensor:
        """See `Pruning.chosen`."""
        return masked_at_most(scores, strength)

    def strengths(self, scores: NeuronScores) -> list[float]:
        """See `Pruning.strengths`."""
        return thresholds_of(scores)

    def trained(self, model: nn.Module, data: Batches, run: Run) -> MaskedNetwork:
        """A copy of `model` with trained masks; it is in training mode, as in the published code."""
        masked = MaskedNetwork(copy_of(model), channels_of(model, data, run))
        optimizer = torch.optim.SGD([masked.masks], lr=self.lr, momentum=MOMENTUM)
        length = budget(self.updates, len(data))

        def step(batch: Batch) -> StepResult:
            delta, xi = self.changes(masked, batch, run)
            optimizer.zero_grad()
            logits, targets = masked.outputs(run, batch, masked.masks)
            changed, _ = masked.outputs(run, batch, masked.masks + delta, 1 + xi)
            clean, robust = task.cross_entropy(logits, targets), task.cross_entropy(changed, targets)
            loss = self.clean_share * clean + (1 - self.clean_share) * robust
            loss.backward()
            check_finite_gradients([("masks", masked.masks)])
            optimizer.step()
            masked.clamp()
            return task.measured(loss, logits, targets)

        run.epochs(STAGE, masked, data.in_batches_of(length.batch_size), step, optimizer, epochs=length.epochs)
        return masked

    def changes(self, masked: MaskedNetwork, batch: Batch, run: Run) -> Tensor:
        """Delta and xi [2, C] for a batch, by gradient ascent from a random start."""
        masks = masked.masks.detach()
        found = masks.new_empty(2, len(masks)).uniform_(-self.bound, self.bound)
        for _ in range(self.steps):
            found.requires_grad_()
            logits, targets = masked.outputs(run, batch, masks + found[0], 1 + found[1])
            gradient = torch.autograd.grad(task.cross_entropy(logits, targets), found)[0]
            found = found.detach() + self.bound / self.steps * gradient.sign()
            if not self.compat:
                found = found.clamp(-self.bound, self.bound)
        return found
