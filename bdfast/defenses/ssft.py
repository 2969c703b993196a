"""SSFT: suppress the skip connection that a backdoor needs most, then fine-tune the stage around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batches
from bdfast.defenses.base import Outcome
from bdfast.defenses.distillation import Distilling
from bdfast.defenses.fine_tuning import Schedule
from bdfast.defenses.parts.ascent import unlearned
from bdfast.defenses.parts.scaled_skips import scaled_sums, set_scaled_sums, suppress_skip, suppressed
from bdfast.defenses.parts.skips import Skip, find_skips
from bdfast.defenses.stages import Begun
from bdfast.inversion.surrogates import Surrogates
from bdfast.training import Run
from bdfast.training.modes import eval_mode


@dataclass(frozen=True)
class SSFTDefense(Distilling):
    """Yang et al., "Backdoor defense via suppressing model shortcuts" (ICASSP 2023, arXiv 2211.05631).

    In a residual network y = F(x) + S(x), one skip S is scaled by gamma, and the stage that holds its block is
    fine-tuned on clean images while all other weights stay. Skips are found by tracing a pass, whatever their names;
    transformers have two in each block. A network without any is refused.

    The published code chooses the skip by the success of the real trigger. The choice without one is ours: a copy of
    the network unlearns the clean images, as in TSBD, which leaves what does not depend on them, and the skip is taken
    without which that copy distributes its answers over the classes most differently.

    Where a skip ends with a convolution or BatchNorm, these weights hold gamma. An identity is no weight: its block
    becomes a subclass of its class, `PurifyResult.save` writes nothing of it, and a network that loads the weights
    needs `bdfast.defenses.set_scaled_sums(network, result.found["scaled_sums"])`.

    Attributes:
        block: Number of the skip, in the order of a pass; left out, it is chosen.
        gamma: What the skip is multiplied by.
        unlearn_lr: Learning rate of the ascent.
        unlearn_to: What unlearning leaves of the accuracy beyond that of a constant answer, as a share.
        unlearn_epochs: Most epochs of ascent; it ends within the epoch that reaches `unlearn_to`.
        schedule: How the learning rate falls from epoch to epoch: "cosine", to zero, or "constant".
        epochs: Epochs of a stage, if not as many as make `updates`; published: 10.
    """

    paper: ClassVar[str] = "Yang et al., ICASSP 2023, arXiv 2211.05631"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "gamma": 0.0,
        "lr": 0.01,
        "schedule": "constant",
        "epochs": 10,
        "distill": 0.0,
        "overlay": 0.0,
        "batch_size": 128,
        "amp": False,
        "augment": None,
    }
    """The published run on CIFAR-10, as arguments of `purify`; `block` is not among them, as the published code chooses
    it with the trigger. What we know of that code says nothing about schedule and augmentation: none here."""

    block: int | None = None
    gamma: float = 0.0
    unlearn_lr: float = 1e-3
    unlearn_to: float = 0.5
    unlearn_epochs: int = 1000
    schedule: Schedule = "cosine"

    rates: ClassVar[Sequence[float]] = (0.01, 0.03, 0.1)

    def __post_init__(self) -> None:
        self.check_at_least("block", 0)
        self.check_share("gamma")
        self.check_positive("unlearn_lr")
        self.check_share("unlearn_to", most=0.9)
        self.check_at_least("unlearn_epochs", 1)
        super().__post_init__()

    def check(self, model: nn.Module, clean: Batches, run: Run) -> None:
        """Refuse a network without skip connections, or without one of the number `block`; see `Defense.check`."""
        super().check(model, clean, run)
        self.skips(model, clean, run)

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Outcome:
        """Purify `model` in place; see `Staged.run`."""
        before = scaled_sums(model)
        try:
            outcome = super().run(model, clean, run)
        except BaseException:
            set_scaled_sums(model, before)
            raise
        if outcome.chosen.get("lr", self.lr) is not None:
            return outcome
        set_scaled_sums(model, before)  # the weights are the given ones
        return replace(outcome, found={**outcome.found, "gamma": 1.0, "scaled_sums": before})

    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """Choose a skip, suppress it, and freeze what is not around it; see `Staged.begin`."""
        skips = self.skips(model, data, run)
        found: dict[str, Any] = {}
        block = self.block
        if block is None:
            changes = self.changes(model, skips, data, run)
            found, block = {"changes": changes}, changes.index(max(changes))
        skip = skips[block]
        suppress_skip(model, skip, self.gamma)
        trained = freeze_others(model, skip)
        found |= {"block": block, "module": skip.module, "trained": trained, "gamma": self.gamma}

        def train(options: SSFTDefense, images: Batches, stage: str) -> None:
            options.fine_tune(model, given, images, run, stage)

        return Begun(train, found={**found, "scaled_sums": scaled_sums(model)})

    def skips(self, model: nn.Module, data: Batches, run: Run) -> list[Skip]:
        """The skips of the network.

        Raises:
            ValueError: There are none, or none of the number `block`.
        """
        batch = next(iter(data.ordered()))
        with eval_mode(model):
            skips = find_skips(model, lambda: run.forward(model, batch))
        if not skips:
            raise ValueError(
                "model: expected a residual network, in which the output of a block is added to its input, got no such "
                f"sum in a pass of a {type(model).__name__}; take another method."
            )
        if self.block is not None and self.block >= len(skips):
            raise ValueError(
                f"block: expected a number below {len(skips)}, as there are {len(skips)} skips in the network, got "
                f"{self.block}; choose one of these, or leave it out."
            )
        return skips

    def changes(self, model: nn.Module, skips: list[Skip], data: Batches, run: Run) -> list[float]:
        """For each skip, the share of answers of the unlearned copy that its suppression moves from class to class."""
        ascent = partial(torch.optim.SGD, lr=self.unlearn_lr, momentum=self.momentum, maximize=True)
        exposed = unlearned(model, data, run, ascent, to=self.unlearn_to, epochs=self.unlearn_epochs)
        before = answered(exposed, data, run)
        changes = []
        for skip in skips:
            with suppressed(exposed, skip, self.gamma):
                changes.append(float((answered(exposed, data, run) - before).abs().sum() / 2))
        return changes


def answered(model: nn.Module, data: Batches, run: Run) -> Tensor:
    """How often a network answers each class [K], as a share of all that counts."""
    counts: Any = 0
    with eval_mode(model), torch.inference_mode(), run.autocast(data.device):
        for batch in data.ordered():
            logits, targets = run.forward(model, batch)[:2]
            answers = logits.argmax(-1)[targets != task.IGNORED]
            counts = counts + answers.bincount(minlength=logits.shape[-1])
    return counts.double() / counts.sum()


def freeze_others(model: nn.Module, skip: Skip) -> str:
    """Freeze all but the module around that of the skip, and the weights that hold gamma; returns its name.

    Where everything in that module is frozen already, it is the one around it.
    """
    fixed = {id(model.get_parameter(name)) for name in skip.parameters}
    name = skip.module
    while True:
        name = name.rpartition(".")[0]
        kept = {id(x) for x in model.get_submodule(name).parameters() if x.requires_grad and id(x) not in fixed}
        if kept or not name:
            break
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    return name
