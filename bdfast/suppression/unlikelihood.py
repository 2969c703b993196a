"""The loss that unlearns a label: large where the network is sure of it, zero where it is gone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdfast.data.batches import Batch
from bdfast.suppression.sgd_training import Objective
from bdfast.task import IGNORED, at_least_float32
from bdfast.training import Run


def margins(logits: Tensor, targets: Tensor) -> Tensor:
    """log(p / (1 - p)) of the labels [M], in float32 or more; `IGNORED` ones are left out.

    Args:
        logits: [..., K].
        targets: [...].
    """
    counts = targets.flatten() != IGNORED
    flat, own = at_least_float32(logits).flatten(0, -2)[counts], targets.flatten()[counts].unsqueeze(1)
    # The sum without the label, as 1 - p is zero in floating-point numbers where p is near to one.
    others = flat.scatter(1, own, float("-inf")).logsumexp(1)
    return flat.gather(1, own).squeeze(1) - others


def unlikelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log(1 - p) of the labels that count, [M] (Welleck et al., "Neural text generation with unlikelihood training").

    By the logits, its gradient is p times that of the margin: it does not vanish where p is near to one, as that of
    gradient ascent on -log(p) does, and it ends by itself.
    """
    return F.softplus(margins(logits, targets))


def signed_losses(logits: Tensor, targets: Tensor, rejected: Tensor) -> Tensor:
    """-log(1 - p) where `rejected` [...], and -log(p) elsewhere: [M]."""
    margin = margins(logits, targets)
    return F.softplus(torch.where(rejected.flatten()[targets.flatten() != IGNORED], margin, -margin))


def unlikely(logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
    """The mean of -log(1 - p), as an objective."""
    return unlikelihood(logits, targets).mean()


def against(reference: nn.Module, labels: Tensor, run: Run) -> Objective:
    """An objective: the mean of -log(1 - p) where the reference rejects the label, and of -log(p) elsewhere.

    Args:
        reference: Says what is poisoned: what has one of the labels and is given another.
        labels: [L] int64, those of the isolated samples.
        run: Gives the forward pass and the precision.
    """
    reference.requires_grad_(False).eval()

    def objective(logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad(), run.autocast(targets.device):
            given = run.forward(reference, batch)[0].argmax(-1)
        rejected = (given != targets) & torch.isin(targets, labels.to(targets.device))
        return signed_losses(logits, targets, rejected).mean()

    return objective
