"""What SAU and i-BAU share: unlearning of adversarial examples, with the optimizer of their published code."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from bdfast.data.batches import Batches
from bdfast.defenses.distillation import Distilling
from bdfast.defenses.stages import Begun
from bdfast.inversion.scene import pixel_limits
from bdfast.inversion.surrogates import Surrogates
from bdfast.training import Run
from bdfast.training.batchnorm import Policy


@dataclass(frozen=True)
class AdversarialUnlearning(Distilling):
    """Fine-tuning on images that were changed so that networks err on them.

    Attributes:
        compat: "official" does as the published code.
    """

    bn: Policy = "frozen"
    compat: Literal["official"] | None = None

    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """See `Staged.begin`.

        Raises:
            ValueError: The batches are not (images, labels).
        """
        limits = pixel_limits(data)
        return Begun(lambda options, images, stage: options.unlearn(model, given, images, run, stage, limits))

    @abstractmethod
    def unlearn(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, stage: str, limits: tuple[float, float]
    ) -> None:
        """Train `model` in place for one stage; `limits` are the least and the greatest pixel value."""

    def optimizer(self, model: nn.Module, given: nn.Module) -> torch.optim.Optimizer:
        """SGD, or the Adam of the published code, which is AMSGrad."""
        if not self.compat:
            return super().optimizer(model, given)
        return torch.optim.Adam(model.parameters(), lr=self.rate, weight_decay=self.weight_decay, amsgrad=True)
