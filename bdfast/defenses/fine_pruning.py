"""Fine-pruning: cut off the features that clean images leave silent, then fine-tune."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batches
from bdfast.defenses.parts.activations import features_into, mean_activations
from bdfast.defenses.parts.classifier import trained_classifier
from bdfast.defenses.stages import Begun, Staged
from bdfast.inversion.surrogates import Surrogates
from bdfast.training import Run
from bdfast.training.seeds import derived_seed

STEPS = 100
"""Most steps; 1 % of the features each, as published."""

RANKED_ON = 0.75
"""Share of the images that rank the features; how many are cut off is chosen on the others."""


@dataclass(frozen=True)
class FinePruningDefense(Staged):
    """Liu, Dolan-Gavitt and Garg, "Fine-pruning: defending against backdooring attacks on deep neural networks"
    (RAID 2018, arXiv 1805.12185).

    What goes into the last linear layer, most often the channels of the last convolution after pooling, is ranked by
    its mean activity on clean images. From the least active on, features are cut off from the classifier, in steps of
    1 %, as long as accuracy on clean images that did not rank them allows. The network is then fine-tuned, and what was
    cut off stays so.

    Activity is the mean absolute value, ours: the published mean value takes a feature that is always far below zero
    for the least active one. For features behind a ReLU both are the same.

    The code in BackdoorBench chooses the number on the test set, cuts off one feature less than it says, and goes on
    with the step that cost too much in place of the one before, of which it keeps no copy.

    Attributes:
        max_pruning_drop: The share of the accuracy that pruning alone may cost.
    """

    paper: ClassVar[str] = "Liu et al., RAID 2018, arXiv 1805.12185"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "max_pruning_drop": 0.1,
        "lr": 0.01,
        "epochs": 100,
        "batch_size": 256,
        "amp": False,
        "augment": Augmentation(shift=4, flip=True),
    }
    """The run of BackdoorBench on CIFAR-10, as arguments of `purify`."""

    max_pruning_drop: float = 0.1

    def __post_init__(self) -> None:
        self.check_share("max_pruning_drop")
        super().__post_init__()

    def check(self, model: nn.Module, clean: Batches, run: Run) -> None:
        """Refuse a last layer that cannot be pruned; see `Defense.check`."""
        super().check(model, clean, run)
        trained_classifier(model, clean, run)

    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """Prune; see `Staged.begin`."""
        name, layer = trained_classifier(model, data, run)
        weight = layer.weight
        pruned = run.once("pruning", lambda: {"pruned": self._chosen(model, name, data, run)})["pruned"]
        pruned = pruned.to(weight.device)

        @torch.no_grad()
        def prune() -> None:
            weight.masked_fill_(pruned, 0)

        def train(options: FinePruningDefense, images: Batches, stage: str) -> None:
            options.fine_tune(model, given, images, run, stage, after=prune)

        prune()
        return Begun(train, done={"pruned_features": int(pruned.sum())})

    def _chosen(self, model: nn.Module, layer: str, data: Batches, run: Run) -> Tensor:
        """[D] bool, the features to cut off."""
        ranking, held_out = data.split(RANKED_ON, derived_seed(run.seed, "pruning"))
        order = mean_activations(model, layer, ranking, run).argsort(stable=True)
        steps = order.split(math.ceil(len(order) / STEPS))[:-1]
        hits = pruned_hits(model.get_submodule(layer), steps, *features_into(model, layer, held_out, run))
        before, *after = hits.tolist()
        within = takewhile(lambda right: before and (before - right) / before < self.max_pruning_drop, after)
        pruned = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        for step, _ in zip(steps, within, strict=False):
            pruned[step] = True
        return pruned


@torch.no_grad()
def pruned_hits(classifier: nn.Module, steps: tuple[Tensor, ...], features: Tensor, targets: Tensor) -> Tensor:
    """The number of right answers before any step and after each, [1 + steps], int64.

    The network does not run for it: a step takes from the logits what its features had put in.

    Args:
        classifier: A linear layer.
        steps: The features that are cut off at each step, beside those of the steps before.
        features: [N, D], what goes into the layer.
        targets: [N].
    """
    columns = classifier.get_parameter("weight").double().T
    inputs = features.double()
    logits = inputs @ columns
    if classifier.bias is not None:
        logits += classifier.get_parameter("bias")
    hits = [(logits.argmax(1) == targets).sum()]
    for step in steps:
        logits -= inputs[:, step] @ columns[step]
        hits.append((logits.argmax(1) == targets).sum())
    return torch.stack(hits)
