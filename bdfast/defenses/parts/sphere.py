"""What FST and D3 share: a new last layer, whose weight leaves where it was and keeps its Frobenius norm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdfast.data.batches import Batches
from bdfast.defenses.distillation import DistillationLoss, Distilling
from bdfast.defenses.parts.classifier import trained_classifier
from bdfast.defenses.stages import Begun
from bdfast.inversion.surrogates import Surrogates
from bdfast.task import at_least_float32
from bdfast.training import Run
from bdfast.training.seeds import derived_seed


@torch.no_grad()
def project_(weight: Tensor, radius: Tensor | float) -> None:
    """Scale `weight` in place to the Frobenius norm `radius`; zeros have no direction and stay zeros."""
    values = at_least_float32(weight)
    # Squares of very small or large elements would be lost.
    largest = values.abs().amax()
    direction = torch.where(largest > 0, values / largest, values)
    norm = torch.linalg.vector_norm(direction)
    weight.copy_(torch.where(norm > 0, direction * (radius / norm), values))


def random_point(like: Tensor, radius: Tensor | float, draws: torch.Generator) -> Tensor:
    """A tensor like `like` of the Frobenius norm `radius`: uniform in a cube around zero, then scaled.

    Drawn on the CPU in float64, so that device and dtype do not change it.
    """
    point = torch.rand(like.shape, generator=draws, dtype=torch.float64) - 0.5
    project_(point, float(radius))
    return point.to(like)


def _replaceable(model: nn.Module, data: Batches, run: Run) -> tuple[str, nn.Linear]:
    name, layer = trained_classifier(model, data, run)
    if not bool(layer.weight.any()):
        raise ValueError(
            f"model: expected a classifier that is not zero, since its norm is kept, got zeros in {name or 'model'}; "
            "load a checkpoint that is trained."
        )
    return name, layer


@dataclass(frozen=True)
class AwayLoss(DistillationLoss):
    """A loss on the images, beside one on the place of the classifier's weight.

    Attributes:
        classifier: Name of that layer.
    """

    classifier: str = field(kw_only=True)

    def weights(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """The classifier's weight in `model`, and in the given network; float32 or more."""
        ours, theirs = (x.get_submodule(self.classifier).get_parameter("weight") for x in (model, self.teacher))
        return at_least_float32(ours), at_least_float32(theirs.detach())


@dataclass(frozen=True)
class OnSphere(Distilling):
    """Fine-tuning with a new classifier, whose weight is scaled to the norm of the given one after every update.

    A class without clean images is lost, since the classifier learns anew from their labels.

    Attributes:
        distill: Share of the loss that asks for the answers of the original model, which works against leaving it;
            none, as published.
        updates: Updates of a stage, about.
        weight_decay: L2 penalty; none, as published.
    """

    distill: float = 0.0
    updates: int = 200
    weight_decay: float = 0.0

    rates: ClassVar[Sequence[float]] = (0.03, 0.1, 0.2)

    @abstractmethod
    def restart(self, layer: nn.Linear, radius: Tensor, draws: torch.Generator) -> None:
        """Give the classifier its first values, in place; `radius` is the norm of its weight."""

    @abstractmethod
    def away(self, given: nn.Module, run: Run, classifier: str) -> AwayLoss:
        """What is minimised; `given` is the original model, `classifier` the name of the layer."""

    def check(self, model: nn.Module, clean: Batches, run: Run) -> None:
        """Refuse a classifier that cannot be replaced; see `Defense.check`."""
        super().check(model, clean, run)
        _replaceable(model, clean, run)

    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """Replace the classifier; see `Staged.begin`."""
        name, layer = _replaceable(model, data, run)
        radius = torch.linalg.vector_norm(at_least_float32(layer.weight.detach()))
        self.restart(layer, radius, torch.Generator().manual_seed(derived_seed(run.seed, "classifier")))

        def train(options: OnSphere, images: Batches, stage: str) -> None:
            loss = options.away(given, run, name)
            options.fine_tune(model, given, images, run, stage, loss=loss, after=lambda: project_(layer.weight, radius))

        return Begun(train)
