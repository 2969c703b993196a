"""A network whose channels are scaled by factors that are trained while its weights stay: what mask methods share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batch, Batches
from bdfast.defenses.parts.classifier import classifier_of
from bdfast.neurons import NeuronIndex, NeuronScores
from bdfast.neurons.channels import channel_index, scaled, scaled_biases
from bdfast.training import Run
from bdfast.training.replaced import replaced


class MaskedNetwork(nn.Module):
    """A network and a mask for each of its channels, all ones at first.

    Args:
        network: A copy; its parameters are frozen, and passes in training mode move its running statistics.
        index: Its channels.

    Attributes:
        network: The same.
        index: The same.
        masks: [C], the only parameter that takes gradients; float32, or float64 as the network.
    """

    def __init__(self, network: nn.Module, index: NeuronIndex) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.index = index
        like = next(network.parameters())
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.masks = nn.Parameter(torch.ones(len(index), dtype=dtype, device=like.device))

    def outputs(
        self, run: Run, batch: Batch, factors: Tensor, bias_factors: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [..., K] in float32 or more, and targets [...], with the channels scaled.

        Args:
            run: Gives the forward pass and the precision.
            batch: What the network takes.
            factors: [C], of the channels; gradients flow to them.
            bias_factors: [C], of the biases beside them; left out, these stay as they are.
        """
        tensors = scaled(self.network, self.index, factors)
        if bias_factors is not None:
            tensors |= scaled_biases(self.network, self.index, bias_factors)
        with replaced(self.network, tensors), run.autocast(self.masks.device):
            logits, targets = run.forward(self.network, batch)
        return task.at_least_float32(logits), targets

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the masks to [0, 1] in place, as they have to be after every step."""
        self.masks.clamp_(0, 1)


def mask_scores(masks: Tensor, index: NeuronIndex) -> NeuronScores:
    """1 - m of every mask [C]."""
    return NeuronScores(_suspicion(masks.detach()), index.layers)


def masked_at_most(scores: NeuronScores, threshold: float) -> Tensor:
    """[C] bool, the channels whose mask is at most `threshold`; a mask of the same float32 is among them."""
    return scores.values >= _suspicion(torch.tensor(threshold))


SHARES = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.12, 0.14, 0.17, 0.2, 0.25)
"""Shares of the channels that are tried, weak to strong."""


def thresholds_of(scores: NeuronScores) -> list[float]:
    """The thresholds at which `SHARES` of the channels go, of which no two are equal.

    How far masks fall depends on the network and on how they are trained, so that no thresholds fit all.
    """
    masks = (1 - scores.values.double()).sort().values
    places = [max(0, round(share * len(masks)) - 1) for share in SHARES]
    return sorted({float(masks[place]) for place in places} - {1.0})


def _suspicion(masks: Tensor) -> Tensor:
    # Masks and threshold are rounded alike, so that equal ones stay equal.
    return 1 - masks.float()


def channels_of(model: nn.Module, data: Batches, run: Run) -> NeuronIndex:
    """The channels of a network, see `channel_index`; the last layer is looked for only where output units are some.

    Raises:
        ValueError: There are no channels, or no last layer that could be told from them.
    """
    index = channel_index(model, None)
    if index.layers[0].kind == "norm":
        return index
    return channel_index(model, classifier_of(model, data, run))
