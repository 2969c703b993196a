"""What SAU and i-BAU share: unlearning of adversarial examples, with the optimizer of their published code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from bdfast.defenses.distillation import Distilling
from bdfast.training.batchnorm import Policy


@dataclass(frozen=True)
class AdversarialUnlearning(Distilling):
    """Fine-tuning on images that were changed so that networks err on them.

    Attributes:
        compat: "official" does as the published code.
    """

    bn: Policy = "frozen"
    compat: Literal["official"] | None = None

    def optimizer(self, model: nn.Module, given: nn.Module) -> torch.optim.Optimizer:
        """SGD, or the Adam of the published code, which is AMSGrad."""
        if not self.compat:
            return super().optimizer(model, given)
        return torch.optim.Adam(model.parameters(), lr=self.rate, weight_decay=self.weight_decay, amsgrad=True)
