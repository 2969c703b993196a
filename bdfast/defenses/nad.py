"""NAD: fine-tune towards the attention maps of a copy that was fine-tuned before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batch, Batches
from bdfast.defenses.loss import FineTuningLoss, PreparedBatch
from bdfast.defenses.parts.attention import MapLayer, attention_maps, layers_with_maps
from bdfast.defenses.stages import Begun, Staged
from bdfast.inversion.surrogates import Surrogates
from bdfast.task import StepResult
from bdfast.training import Run
from bdfast.training.copies import copy_of
from bdfast.training.modes import eval_mode

SHARES = (0.5, 1.0, 1.0)
"""Weights of the maps in multiples of `beta`, early to late: 500, 1000 and 1000 are published."""


@dataclass(frozen=True)
class NADDefense(Staged):
    """Li et al., "Neural attention distillation: erasing backdoor triggers from deep neural networks" (ICLR 2021,
    arXiv 2101.05930).

    A copy of the network, the teacher, is fine-tuned on the clean images, in each stage as long and at the same rate as
    the network. The network then learns the labels, and to have the attention maps of the teacher in three layers: the
    sums of the squared features at each position, brought to the length 1. The teacher is in eval mode then.

    Which layers these are is found by a pass (ours; see `layers_with_maps`). Both networks make one pass a batch. The
    code in BackdoorBench makes four and three, of parts of the networks, and those of the student in training mode move
    its BatchNorm statistics again. In its PreAct-ResNet18 the last of the three maps comes after the pooling, where it
    has one position and is the same in both networks; here it comes before.

    Attributes:
        beta: Weight of the distance between the maps; the first of three has half of it, as published.
    """

    paper: ClassVar[str] = "Li et al., ICLR 2021, arXiv 2101.05930"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "beta": 1000.0,
        "lr": 0.01,
        "epochs": 10,
        "schedule": "constant",
        "batch_size": 256,
        "amp": False,
        "augment": Augmentation(shift=4, flip=True),
    }
    """The run of BackdoorBench on CIFAR-10, as arguments of `purify`. It lowers the learning rate to 1e-4 after 20
    epochs, but ends after 10, and gives the teacher a cosine of 100 epochs, of which 10 are made. The code of the
    authors has a teacher that was trained before, SGD with Nesterov momentum, and a map of the last layer alone."""

    beta: float = 1000.0

    def __post_init__(self) -> None:
        self.check_at_least("beta", 0)
        super().__post_init__()

    def check(self, model: nn.Module, clean: Batches, run: Run) -> None:
        """Refuse a network without layers whose outputs have positions; see `Defense.check`."""
        super().check(model, clean, run)
        layers_with_maps(model, clean, run)

    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """See `Staged.begin`."""
        layers = layers_with_maps(given, data, run)
        teacher = copy_of(model)

        def train(options: NADDefense, images: Batches, stage: str) -> None:
            options.fine_tune(teacher, given, images, run, stage.replace("fine-tune", "teacher"))
            loss = AttentionLoss(run, options.label_smoothing, teacher=teacher, layers=layers, beta=options.beta)
            options.fine_tune(model, given, images, run, stage, loss=loss)

        def restart() -> None:
            teacher.load_state_dict(given.state_dict())

        return Begun(train, found={"attention_layers": [layer.name for layer in layers]}, restart=restart)


@dataclass(frozen=True)
class AttentionLoss(FineTuningLoss):
    """Cross-entropy, and the distance between the attention maps of two networks.

    Attributes:
        teacher: Only read.
        layers: Where the maps are.
        beta: Weight of the distance.
    """

    teacher: nn.Module = field(kw_only=True)
    layers: list[MapLayer] = field(kw_only=True)
    beta: float = field(kw_only=True)

    def prepare(self, batch: Batch) -> PreparedBatch:
        """Ask the teacher for its maps."""
        with eval_mode(self.teacher), torch.no_grad(), attention_maps(self.teacher, self.layers) as maps:
            self.outputs(self.teacher, batch)
        return PreparedBatch(batch, beside=maps)

    def __call__(self, model: nn.Module, prepared: PreparedBatch) -> StepResult:
        """The loss of `model` on a batch, from one pass."""
        with attention_maps(model, self.layers) as maps:
            result = super().__call__(model, prepared)
        loss = result.loss
        for layer, share in zip(self.layers, SHARES[-len(self.layers) :], strict=True):
            if layer.name in maps and layer.name in prepared.beside:  # a block may be skipped at random
                distance = F.mse_loss(maps[layer.name], prepared.beside[layer.name])
                loss = loss + self.beta * share * distance
        return result._replace(loss=loss)
