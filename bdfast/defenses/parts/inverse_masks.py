"""The network that IMS trains masks of: factors of its channels, their inverse, and what answers are compared by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batch
from bdfast.defenses.parts.masks import MaskedNetwork
from bdfast.neurons import NeuronIndex
from bdfast.training import Run

STEEPNESS = 20.0
"""Of the sigmoid between mask and factor (k)."""

TINY = 1e-8
"""Keeps the logarithms finite."""


class InvertibleMasks(MaskedNetwork):
    """Masks m that count as far as a channel is selected, which is where s is small; always in eval mode.

    Args:
        network: See `MaskedNetwork`.
        index: See there.

    Attributes:
        selection: s [C], ones at first.
    """

    def __init__(self, network: nn.Module, index: NeuronIndex) -> None:
        super().__init__(network, index)
        self.selection = nn.Parameter(torch.ones_like(self.masks))

    def train(self, mode: bool = True) -> InvertibleMasks:
        """Stay in eval mode, as in the published code."""
        super().train(False)
        return self

    def factors(self, *, inverse: bool = False) -> Tensor:
        """[C] in [0, 1]; `inverse`: with masks 1 - m and the same selection."""
        masks = 1 - self.masks if inverse else self.masks
        gates = torch.sigmoid(STEEPNESS * (masks - 0.5))
        return gates + self.selection * (1 - gates)

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring masks and selection to [0, 1] in place."""
        super().clamp()
        self.selection.clamp_(0, 1)

    def answers(self, run: Run, batch: Batch, factors: Tensor) -> Tensor:
        """Probabilities [..., K], with factors [C] on the channels and their biases."""
        return self.outputs(run, batch, factors, factors)[0].softmax(-1)

    def given(self, run: Run, batch: Batch) -> Tensor:
        """Those of the network as it was given."""
        with run.autocast(self.masks.device):
            logits = run.forward(self.network, batch)[0]
        return task.at_least_float32(logits).softmax(-1)

    def error(self, run: Run, batch: Batch, changed: Batch | None) -> tuple[Tensor, Tensor, Tensor]:
        """What masks and selection lower [], beside a penalty; logits and targets of the masked network.

        Args:
            run: Gives the forward pass and the precision.
            batch: Clean images.
            changed: The same images, changed; None leaves out what they say.
        """
        kept, dropped = self.factors(), self.factors(inverse=True)
        with torch.no_grad():
            clean = self.given(run, batch)
        logits, targets = self.outputs(run, batch, kept, kept)
        error = disagreeing(logits.softmax(-1), clean) + agreeing(self.answers(run, batch, dropped), clean)
        if changed is not None:
            with torch.no_grad():
                led = self.given(run, changed)
            obeying = self.answers(run, changed, dropped)
            error = error + disagreeing(self.answers(run, changed, kept), clean)
            error = error + disagreeing(obeying, led) + agreeing(obeying, clean)
        return error, logits, targets


def disagreeing(first: Tensor, second: Tensor) -> Tensor:
    """The mean [], over probabilities [..., K], of how far two networks are from giving the same class."""
    return -torch.log((first * second).sum(-1) + TINY).mean()


def agreeing(first: Tensor, second: Tensor) -> Tensor:
    """The same of how far they are from giving different ones."""
    return -torch.log(1 - (first * second).sum(-1) + TINY).mean()
