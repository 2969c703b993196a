"""Adversarial noise on channels: their scales and biases are multiplied so that the loss on clean images grows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batch, Batches
from bdfast.defenses.parts.classifier import classifier_of
from bdfast.detectors.exposures.standing import Ended
from bdfast.neurons import NeuronIndex
from bdfast.neurons.channels import channel_index, scaled, scaled_biases
from bdfast.ops.finite import check_finite_gradients
from bdfast.task import StepResult
from bdfast.training import Run
from bdfast.training.copies import copy_of
from bdfast.training.replaced import replaced

BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Largest changes of a factor that are tried, as published, without 0."""

PASSES, PACE = 2, 0.25
"""Passes over the images for each budget, and the length of a step as a share of it."""

OFFICIAL_PASSES, OFFICIAL_STEP = 6, 0.2
"""Of the published code."""


class NoisyNetwork(nn.Module):
    """A network whose channels and biases beside them are multiplied by 1 + noise.

    Args:
        network: A copy; its parameters are frozen.
        index: Its channels.

    Attributes:
        network: The same.
        noise: [2, C]: of the scales, and of the biases; the only parameter that takes gradients.
    """

    def __init__(self, network: nn.Module, index: NeuronIndex) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.index = index
        like = next(network.parameters())
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.noise = nn.Parameter(torch.zeros(2, len(index), dtype=dtype, device=like.device))

    def tensors(self) -> dict[str, Tensor]:
        """The parameters with the noise on them, by name."""
        scales, biases = 1 + self.noise
        return scaled(self.network, self.index, scales) | scaled_biases(self.network, self.index, biases)

    @torch.no_grad()
    def baked(self) -> nn.Module:
        """The network, with the noise written into its parameters."""
        named = dict(self.network.named_parameters(remove_duplicate=False))
        for name, tensor in self.tensors().items():
            named[name].copy_(tensor)
        return self.network


def noisy(
    model: nn.Module,
    images: Batches,
    run: Run,
    *,
    batch_statistics: bool,
    ended: Ended,
    stage: str,
    official: bool = False,
    budgets: Sequence[float] = BUDGETS,
) -> nn.Module:
    """A copy with noise of the first budget at which `ended` says so, or of the largest.

    Channels are the scales of normalisation layers; in a network without these, output units of convolution and linear
    layers (ours). A step goes along the sign of the gradient of the cross-entropy, up. By default noise starts random
    within the budget, is carried from step to step, and stays within the budget (ours).

    Args:
        model: Only read.
        images: Clean images, in batches of the size of a step.
        run: Seed, precision, progress and history.
        batch_statistics: Whether BatchNorm normalises with the batch.
        ended: Asked after every budget.
        stage: How its names in history and progress begin.
        official: As the published code: noise is drawn anew for every step, which has a length of 0.2 and may leave the
            budget; the last noise stays.
        budgets: In ascending order.

    Raises:
        ValueError: The network has no channels.
        FloatingPointError: A gradient is NaN or infinite.
    """
    copy = copy_of(model)
    index = channel_index(copy, None)
    if index.layers[0].kind != "norm":
        index = channel_index(copy, classifier_of(copy, images, run))
    network = NoisyNetwork(copy, index)
    for budget in budgets:
        with torch.no_grad():
            network.noise.uniform_(-budget, budget)
        optimizer = torch.optim.SGD([network.noise], lr=OFFICIAL_STEP if official else PACE * budget, maximize=True)

        def step(batch: Batch, budget: float = budget, optimizer: torch.optim.Optimizer = optimizer) -> StepResult:
            network.train(batch_statistics)
            if official:
                with torch.no_grad():
                    network.noise.uniform_(-budget, budget)
            optimizer.zero_grad()
            with replaced(network.network, network.tensors()), run.autocast(images.device):
                logits, targets = run.forward(network.network, batch)
            loss = task.cross_entropy(logits, targets)
            loss.backward()
            check_finite_gradients([("noise", network.noise)])
            with torch.no_grad():
                if network.noise.grad is not None:
                    network.noise.grad.sign_()
            optimizer.step()
            if not official:
                with torch.no_grad():
                    network.noise.clamp_(-budget, budget)
            return task.measured(loss, logits, targets)

        passes = OFFICIAL_PASSES if official else PASSES
        run.epochs(f"{stage}, noise up to {budget:g}", network, images, step, optimizer, epochs=passes)
        with torch.no_grad():
            tensors = network.tensors()
        with replaced(network.network, tensors):
            finished = ended(network.network)
        if finished:
            break
    return network.baked()
