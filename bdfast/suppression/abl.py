"""ABL: Anti-Backdoor Learning (Li et al., NeurIPS 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from bdfast.data.batches import Batch, Batches
from bdfast.suppression.base import Suppressed
from bdfast.suppression.isolation import Isolation
from bdfast.suppression.local_ascent import LGA, held_at
from bdfast.suppression.sample_losses import SampleScores, losses_of
from bdfast.suppression.sgd_training import SGDTraining, enough_epochs, plain_loss
from bdfast.suppression.unlikelihood import against, unlikely
from bdfast.training import Run
from bdfast.training.copies import copy_of

LEAST = 2
"""Isolated samples; one has no variance, which BatchNorm refuses."""

KEPT = 0.5
"""Accuracy on the isolated samples above which the result warns."""

DAMAGED = 0.05
"""A loss of accuracy by the unlearning, as a fraction, above which the result warns."""


@dataclass(frozen=True)
class ABLSuppression(SGDTraining):
    """Anti-Backdoor Learning: find the samples that are learned first, and unlearn them at the end.

    Training whose loss is held at `gamma` comes first: what is poisoned is learned sooner than the task, and alone
    falls far below that. The samples with the least loss are isolated, the network is trained on the rest, and then
    unlearns the isolated ones.

    The published unlearning, gradient ascent, hangs on the number of updates and on BatchNorm: the better a sample is
    known, the smaller is its gradient, so that at first nothing happens and then the network is lost. The defaults do
    it in two steps of our own. The first minimises -log(1 - p) for the probability p of the label, whose gradient is
    large where the label is sure and vanishes where it is gone, and ends at a given cost in accuracy. What has a label
    of the isolated samples and is no longer given it is taken for poisoned as well. The second step trains on all
    samples: on these to unlearn the label, and on the others to learn it.

    It is made for data whose poisoned samples have one label. Against attackers who control the training, such as
    WaNet's, it is weak in the literature.

    Attributes:
        ratio: Share of the samples that are isolated; at least 2 samples.
        isolation_epochs: Of the first stage; left out, 20, or as many as make 400 updates.
        gamma: Where it holds the loss.
        lga: How: by the mean loss of the "batch", by the loss of each "sample", or by "flooding", which moves the
            weights as "batch" does.
        epochs: Of the training on the rest; left out, 60, or as many as make 1,200 updates.
        unlearn: What unlearns the isolated samples: "unlikelihood", ours, or the published "ascent".
        unlearn_epochs: Most passes over the isolated samples; left out, as many as make 40 updates.
        unlearn_lr: Learning rate of these.
        unlearn_drop: They end with the pass that costs this much accuracy, as a fraction, on samples of the rest that
            have another label; None for never. Ours.
        recover_epochs: Passes over all samples after that; left out, 2, or as many as make 100 updates. Ours.
        recover_lr: Learning rate at their start.
        bn: What BatchNorm does while the isolated samples are unlearned, whose batches hold little else than poison:
            "frozen" leaves its statistics alone, "official" moves them.
    """

    ratio: float = 0.01
    isolation_epochs: int | None = None
    gamma: float = 0.5
    lga: LGA = "batch"
    epochs: int | None = None
    unlearn: Literal["unlikelihood", "ascent"] = "unlikelihood"
    unlearn_epochs: int | None = None
    unlearn_lr: float = 5e-4
    unlearn_drop: float | None = 0.1
    recover_epochs: int | None = None
    recover_lr: float = 0.01
    bn: Literal["frozen", "official"] = "frozen"

    paper: ClassVar[str] = "Li et al., Anti-Backdoor Learning, NeurIPS 2021, arXiv 2110.11571"
    drops: ClassVar[tuple[float, ...]] = (2 / 3,)
    PUBLISHED: ClassVar[dict[str, Any]] = {
        "isolation_epochs": 10,
        "epochs": 60,
        "unlearn": "ascent",
        "unlearn_epochs": 5,
        "unlearn_drop": None,
        "recover_epochs": 0,
        "lga": "flooding",
        "schedule": "step",
        "weight_decay": 1e-4,
        "bn": "official",
        "batch_size": 128,
    }
    """The official code; Wide ResNet 16-1 on CIFAR-10. The paper isolates after 20 epochs."""

    def __post_init__(self) -> None:
        self.check_share("ratio", most=0.5)
        for name, least in (("isolation_epochs", 1), ("epochs", 1), ("unlearn_epochs", 0), ("recover_epochs", 0)):
            self.check_at_least(name, least)
        self.check_positive("gamma", "unlearn_lr", "recover_lr")
        self.check_one_of("lga", "batch", "sample", "flooding")
        self.check_one_of("unlearn", "unlikelihood", "ascent")
        self.check_one_of("bn", "frozen", "official")
        if self.unlearn_drop is not None:
            self.check_share("unlearn_drop")
        super().__post_init__()

    def check(self, model: nn.Module, suspicious: Batches, run: Run) -> None:
        """See `Suppression.check`.

        Raises:
            ValueError: Fewer than two samples would be isolated.
        """
        if (count := self._count(suspicious)) < LEAST:
            raise ValueError(
                f"ratio: expected a share that isolates at least {LEAST} samples, got {self.ratio}, which are {count} "
                f"of {len(suspicious)}; raise it, or pass more samples."
            )

    def run(self, model: nn.Module, suspicious: Batches, run: Run) -> Suppressed:
        """See `Suppression.run`."""
        epochs = self.settled(suspicious)
        self.train(
            "isolate", model, suspicious, run, self._held, epochs=epochs["isolation_epochs"], schedule="constant"
        )
        losses = SampleScores(**run.once("isolation", lambda: losses_of(model, suspicious, run.forward).as_state()))
        isolation = Isolation(losses, losses.lowest(self._count(suspicious)))
        rest, isolated, others = (
            suspicious.part(places) for places in (isolation.rest, isolation.places, isolation.bystanders)
        )
        self.train("fine-tune", model, rest, run, plain_loss, epochs=epochs["epochs"])
        before = run.accuracy(model, others)
        floor = 0.0 if self.unlearn_drop is None else before - self.unlearn_drop
        self.train(
            "unlearn",
            model,
            isolated,
            run,
            plain_loss if self.unlearn == "ascent" else unlikely,
            epochs=epochs["unlearn_epochs"],
            lr=self.unlearn_lr,
            schedule="constant",
            ascend=self.unlearn == "ascent",
            frozen=self.bn == "frozen",
            ended=lambda row: self.unlearn_drop is not None and run.accuracy(model, others) < floor,
        )
        if epochs["recover_epochs"]:
            recover = against(copy_of(model), isolation.label_numbers, run)
            self.train("recover", model, suspicious, run, recover, epochs=epochs["recover_epochs"], lr=self.recover_lr)
        kept, lost = run.accuracy(model, isolated), before - run.accuracy(model, others)
        return Suppressed(
            losses.indices[isolation.places],
            chosen=epochs,
            found={"isolated_labels": isolation.labels, "isolated_accuracy": kept},
            warnings=(*isolation.warnings(), *_warnings(kept, lost)),
        )

    def settled(self, data: Batches) -> dict[str, int]:
        """Epochs of every stage."""
        samples, size = len(data), data.batch_size
        left_out = {
            "isolation_epochs": enough_epochs(20, 400, samples, size),
            "epochs": enough_epochs(60, 1200, samples, size),
            "unlearn_epochs": enough_epochs(1, 40, self._count(data), size),
            "recover_epochs": enough_epochs(2, 100, samples, size),
        }
        given = {name: getattr(self, name) for name in left_out}
        return {name: left_out[name] if value is None else value for name, value in given.items()}

    def _count(self, data: Batches) -> int:
        return int(self.ratio * len(data))

    def _held(self, logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        return held_at(logits, targets, self.gamma, self.lga)


def _warnings(kept: float, lost: float) -> list[str]:
    """What to say of the unlearning.

    Args:
        kept: Accuracy on the isolated samples.
        lost: What it cost in accuracy on samples of other labels.
    """
    told = []
    if kept > KEPT:
        told.append(
            f"unlearn_lr: expected isolated samples that are unlearned, got {kept:.1%} of them with their label still; "
            "raise it, unlearn_epochs or unlearn_drop."
        )
    if lost > DAMAGED:
        told.append(
            f"unlearn_lr: expected an unlearning that keeps the accuracy on samples of other labels, got one that "
            f"costs {100 * lost:.1f} points; lower it or unlearn_drop, or raise recover_epochs."
        )
    return told
