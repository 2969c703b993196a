"""How much benign images depend on each value of a feature map."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdfast.data.batches import Batch, Batches
from bdfast.inversion.features import Features
from bdfast.task import StepResult, measured
from bdfast.training import Run
from bdfast.training.batchnorm import kept_statistics

LR = 0.01


class BenignMask(nn.Module):
    """A number in (0, 1) for every value of a feature map: how much benign images depend on it."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.randn(1, *shape))

    def forward(self) -> Tensor:
        """[1, *shape]."""
        return torch.tanh(self.z) / 2 + 0.5


def learn_mask(
    mask: BenignMask,
    network: nn.Module,
    features: Features,
    logits: Callable[..., Tensor],
    clean: Batches,
    run: Run,
    stage: str,
    *,
    epochs: int,
    training: bool,
) -> None:
    """Benign images are to be recognised by what the mask keeps and not by what it takes away.

    Args:
        mask: Learnt in place.
        network: The suspect network, whose weights stay; left in eval mode.
        features: Those of the network.
        logits: (images, labels, ...) -> [B, K], of the network.
        clean: Batches of (images, labels, ...).
        run: Seed, precision, progress and checkpoints.
        stage: Name in these.
        epochs: Passes over `clean`.
        training: The network is in training mode meanwhile, and its BatchNorm statistics move once in a step.
    """
    optimizer = torch.optim.Adam(mask.parameters(), lr=LR)
    # Statistics that move have to lie in the checkpoints.
    learnt = nn.ModuleList([mask, network]) if training else mask

    def step(batch: Batch) -> StepResult:
        images, targets = batch[:2]
        optimizer.zero_grad()
        features.mask = mask()
        answers = logits(images, *batch[1:])
        features.mask = 1 - mask()
        with kept_statistics(network) if training else nullcontext():
            loss = F.cross_entropy(answers, targets) - F.cross_entropy(logits(images, *batch[1:]), targets)
            features.mask = None
            loss.backward()
        optimizer.step()
        return measured(loss, answers, targets)

    run.epochs(stage, learnt, clean, step, optimizer, epochs=epochs, record=False)
    network.eval()
