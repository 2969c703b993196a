"""Teaching a generator to change nothing, before it is taught a trigger."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bdfast.data.batches import Batch, Batches
from bdfast.inversion.features import Features
from bdfast.inversion.generator import Generator
from bdfast.ops.finite import check_finite_gradients
from bdfast.task import StepResult, at_least_float32, measured
from bdfast.training import Run

FAR = 0.1
"""Mean square of the change above which it counts `HEAVY` and not `LIGHT`."""
HEAVY, LIGHT = 100.0, 0.01


def pretrain(
    generator: Generator,
    features: Features,
    logits: Callable[..., Tensor],
    clean: Batches,
    run: Run,
    stage: str,
    *,
    epochs: int,
    lr: float,
    unit: float,
) -> None:
    """As the published code of BTI-DBF does it: the same answers, the same features, and nearly the same images.

    Its cross-entropy takes the answers to the clean images through two softmaxes.

    Args:
        generator: Trained in place.
        features: Those of the network.
        logits: (images, labels, ...) -> [B, K].
        clean: Batches of (images, labels, ...).
        run: Seed, precision, progress and checkpoints.
        stage: Name in these.
        epochs: Passes over `clean`.
        lr: Learning rate (Adam).
        unit: The change of a pixel that counts as 1.
    """
    optimizer = torch.optim.Adam([x for x in generator.parameters() if x.requires_grad], lr=lr)

    def step(batch: Batch) -> StepResult:
        images, targets = batch[:2]
        with torch.no_grad():
            wanted = logits(images, *batch[1:])
            before = at_least_float32(features.values)
        optimizer.zero_grad()
        with run.autocast(clean.device):
            changed = generator(images)
        answers = logits(changed, *batch[1:])
        moved = F.mse_loss(at_least_float32(features.values), before)
        distance = (changed - images).square().mean() / unit**2
        weight = torch.where(distance > FAR, HEAVY, LIGHT)
        loss = F.cross_entropy(wanted.softmax(1), answers.softmax(1)) + moved + weight * distance
        loss.backward()
        check_finite_gradients(generator.named_parameters())
        optimizer.step()
        return measured(loss, answers, targets)

    run.epochs(stage, generator, clean, step, optimizer, epochs=epochs, record=False)
