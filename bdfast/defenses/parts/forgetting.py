"""What ULRL and RNP begin with: a copy of the network that has unlearned the clean images in small steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from bdfast.data.batches import Batches
from bdfast.defenses.base import Defense
from bdfast.defenses.parts.ascent import unlearned, unlearned_as_published
from bdfast.training import Run

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
"""Of the ascent, as published."""

BATCH_SIZE = 128
"""Of the ascent, as published, or that of the data where it is smaller."""

OFFICIAL_STOP = 0.2
"""Accuracy of an epoch at which the published code ends unlearning, whatever the number of classes."""

OFFICIAL_MILESTONES = (10, 20)
"""Epochs after which the published code has a tenth of the learning rate."""


@dataclass(frozen=True)
class Forgetting(Defense):
    """A method that unlearns the clean images in a copy of the network, which shows what holds the backdoor.

    Attributes:
        unlearn_lr: Learning rate of the ascent, as published.
        unlearn_to: What unlearning leaves of the accuracy beyond that of a constant answer, as a share. Published: an
            accuracy of 0.2 whatever the number of classes, which with ten is about this share.
        unlearn_epochs: Most epochs of ascent; it ends within the epoch that reaches `unlearn_to`; published: 20.
        compat: "official" does as the published code. It unlearns until an epoch, as its steps saw it, has an accuracy
            of at most 0.2, whatever `unlearn_to`, at a tenth of the learning rate after 10 and again after 20 epochs,
            and goes on with what it has where `unlearn_epochs` do not get there.
    """

    unlearn_lr: float = 0.01
    unlearn_to: float = 0.12
    unlearn_epochs: int = 1000
    compat: Literal["official"] | None = None

    longest_gradient: ClassVar[float | None] = None
    """The length to which gradients of the ascent are cut; None for any."""

    def __post_init__(self) -> None:
        self.check_positive("unlearn_lr")
        self.check_share("unlearn_to", most=0.9)
        self.check_at_least("unlearn_epochs", 1)
        super().__post_init__()

    def forgetful(self, model: nn.Module, data: Batches, run: Run) -> nn.Module:
        """The copy; `model` is only read.

        Raises:
            ValueError: The model is no better than a constant answer.
            RuntimeError: The epochs are not enough.
        """
        if not self.compat:
            batches = data.in_batches_of(min(BATCH_SIZE, data.batch_size))
            return unlearned(model, batches, run, self._ascent, to=self.unlearn_to, epochs=self.unlearn_epochs)
        return unlearned_as_published(
            model,
            data,
            run,
            self._ascent,
            ended=lambda _, epoch: epoch.accuracy <= OFFICIAL_STOP,
            epochs=self.unlearn_epochs,
            lr=lambda epoch: self.unlearn_lr * 0.1 ** sum(epoch >= milestone for milestone in OFFICIAL_MILESTONES),
        )

    def _ascent(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        params = list(params)
        ascent = torch.optim.SGD(
            params, lr=self.unlearn_lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, maximize=True
        )
        longest = self.longest_gradient
        if longest is not None:

            def cut(*_: Any) -> None:
                clip_grad_norm_(params, longest)

            ascent.register_step_pre_hook(cut)
        return ascent
