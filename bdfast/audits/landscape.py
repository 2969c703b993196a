"""Loss landscape: the sharpness of one network, and the linear path between two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bdfast.data.batches import Batches
from bdfast.evaluation.evaluator import Evaluator, Metrics
from bdfast.optim import perturbed
from bdfast.task import Forward, cross_entropy, default_forward, device_of, hits, normalized
from bdfast.training.batchnorm import recalibrate
from bdfast.training.copies import copy_of
from bdfast.training.modes import preserved_modes

Statistics = Literal["recalibrate", "interpolate"]
"""BatchNorm statistics of a network between two: estimated anew, or in between like the parameters."""


@dataclass(frozen=True)
class Landscape:
    """Two networks, and what is between them; the report draws it.

    Attributes:
        radii: Distances from the weights, [R].
        losses: Loss at each of them along the gradient, of the network before and after.
        path: (t, metrics) at (1 - t) before + t after.
        note: On which data.
    """

    radii: list[float]
    losses: tuple[list[float], list[float]]
    path: list[tuple[float, Metrics]]
    note: str


def loss_along_gradient(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    radii: Sequence[float],
    *,
    batch_size: int = 256,
    forward: Forward = default_forward,
) -> list[float]:
    """L(w + r g / ||g||) for every r, with g the gradient of the mean cross-entropy L over `data`, in eval mode.

    How fast it rises is the sharpness that SAM lowers (Foret et al., ICLR 2021, eq. 2). The model is left as it was.

    Args:
        model: Any classifier.
        data: Images with labels; a few hundred are enough.
        radii: Distances, in the units of the weights.
        batch_size: For a data set; a DataLoader brings its own.
        forward: For batches of another form.
    """
    batches = Batches(data, device=device_of(model), batch_size=batch_size, name="data")
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.grad for parameter in params]

    def mean_loss(then: Callable[[torch.Tensor], object]) -> float:
        total, predictions = 0.0, 0
        for batch in batches.ordered():
            logits, targets = normalized(forward)(model, batch)[:2]
            count = int(hits(logits, targets)[1])
            loss = cross_entropy(logits, targets) * count
            then(loss)
            total += float(loss.detach())
            predictions += count
        return total / predictions

    losses = []
    with preserved_modes(model):
        model.eval()
        for parameter in params:
            parameter.grad = None
        try:
            with torch.enable_grad():
                mean_loss(lambda loss: loss.backward())
            for radius in radii:
                with perturbed(params, rho=radius), torch.no_grad():
                    losses.append(mean_loss(lambda loss: None))
        finally:
            for parameter, gradient in zip(params, kept, strict=True):
                parameter.grad = gradient
    return losses


def metrics_along_path(
    before: nn.Module,
    after: nn.Module,
    evaluator: Evaluator,
    *,
    recalibrate_on: Dataset[Any] | DataLoader[Any] | Batches,
    points: int = 11,
    bn: Statistics = "recalibrate",
) -> list[tuple[float, Metrics]]:
    """ACC and ASR at (1 - t) before + t after, for t from 0 to 1 in even steps.

    Whether the backdoor is near: Min et al. (NeurIPS 2024), linear mode connectivity. Parameters and buffers are
    interpolated; of a buffer of whole numbers, the nearer network gives the value.

    Args:
        before: The original network.
        after: One of the same architecture.
        evaluator: Holds the test data.
        recalibrate_on: Clean images for the BatchNorm statistics.
        points: How many t, at least 2.
        bn: "recalibrate" estimates the BatchNorm statistics anew at every point, both ends included, since those of a
            network in between belong to neither. "interpolate" leaves them as they are in between, so that the ends
            are the two networks themselves.
    """
    clean = recalibrate_on
    if not isinstance(clean, Batches):
        clean = Batches(clean, device=device_of(after), name="recalibrate_on")
    between = copy_of(after)
    rows = []
    for t in torch.linspace(0, 1, points).tolist():
        _interpolate(between, before, after, t)
        if bn == "recalibrate":
            recalibrate(between, clean.ordered(), evaluator.forward)
        rows.append((t, evaluator(between)))
    return rows


@torch.no_grad()
def _interpolate(between: nn.Module, before: nn.Module, after: nn.Module, t: float) -> None:
    tensors = ((*model.parameters(), *model.buffers()) for model in (between, before, after))
    for x, start, end in zip(*tensors, strict=True):
        nearer = start if t < 0.5 else end
        # Where both are the same no arithmetic: buffers may be infinite, as masks are.
        x.copy_(torch.where(start == end, end, start.lerp(end, t)) if x.is_floating_point() else nearer)


def survey(
    before: nn.Module,
    after: nn.Module,
    evaluator: Evaluator,
    clean: Dataset[Any],
    *,
    note: str,
    reach: float = 0.01,
    points: int = 11,
) -> Landscape:
    """Both for the report: the loss up to `reach` times the norm of the first network's weights, and the path."""
    norm = nn.utils.get_total_norm([parameter.detach() for parameter in before.parameters()])
    radii = torch.linspace(0, reach * float(norm), points).tolist()
    return Landscape(
        radii=radii,
        losses=(loss_along_gradient(before, clean, radii), loss_along_gradient(after, clean, radii)),
        path=metrics_along_path(before, after, evaluator, recalibrate_on=clean, points=points),
        note=note,
    )
