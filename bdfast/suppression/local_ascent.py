"""ABL's local gradient ascent: a loss that holds the loss at a level."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from bdfast import task
from bdfast.suppression.sample_losses import sample_losses

LGA = Literal["batch", "sample", "flooding"]


def held_at(logits: Tensor, targets: Tensor, gamma: float, lga: LGA = "batch") -> Tensor:
    """The loss [] of local gradient ascent: it descends above `gamma` and ascends below.

    * "batch": sign(m - gamma) m, where m is the mean loss of the batch; what all public codes have.
    * "sample": the mean of sign(l - gamma) l over the losses l of the samples.
    * "flooding": |m - gamma| + gamma, the default of the official code. Its gradient is that of "batch".

    Args:
        logits: [B, ..., K].
        targets: [B, ...].
        gamma: The level.
        lga: Which form.
    """
    if lga == "sample":
        losses = sample_losses(logits, targets)
        return ((losses - gamma).sign() * losses).mean()
    mean = task.cross_entropy(logits, targets)
    return (mean - gamma).abs() + gamma if lga == "flooding" else (mean - gamma).sign() * mean
