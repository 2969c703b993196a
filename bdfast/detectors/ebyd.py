"""EBYD: make a copy forget its clean task, and look which class clean images go to then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from bdfast.data.batches import Batches
from bdfast.detectors.base import Detector, Finding
from bdfast.detectors.exposures import clean_unlearning, label_shuffling
from bdfast.detectors.exposures.activation_pruning import Direction, pruned
from bdfast.detectors.exposures.channel_noise import noisy
from bdfast.detectors.exposures.retraining import Schedule
from bdfast.detectors.exposures.standing import Ended, ended_at, standing_of
from bdfast.detectors.exposures.top_class import Rule, statistic
from bdfast.training import Run
from bdfast.training.seeds import derived_seed, seeded

Exposure = Literal["unlearn", "shuffle", "prune", "noise"]
BatchNorm = Literal["train", "frozen"]

BATCH_SIZE = 128
"""Of an update, as published, or that of the data where it is smaller."""

PASS = 8
"""Most updates between two looks at the accuracy; further images are held out."""

KEPT = 0.7
"""What an exposure leaves of the accuracy beyond that of a constant answer, for the rule "errors" (ours)."""

FEW = 20
"""Wrong predictions below which their shares say little."""


@dataclass(frozen=True)
class EBYD(Detector):
    """Li et al., "Expose Before You Defend" (arXiv 2410.19427): a backdoor outlives the clean task.

    A copy of the network is changed until it has lost accuracy on clean images. In a network with a backdoor, what
    replaces the right answers is most often the target label. An attack with several targets, or one for each label,
    has no such class and is not found.

    Clean networks, too, fall back on one class once they have forgotten enough. So the default looks earlier than the
    published path (`bn="frozen"`, until hardly anything is left), at the wrong predictions alone, lets BatchNorm
    normalise with the batch, and repeats (ours). In trials that are not kept, the scale-free rule on the published path
    flagged clean networks; the default named targets in networks with BatchNorm, where scores of clean ones came near
    the threshold, and did not find patches in networks without. Where there is a clean network of the same kind,
    compare with its score.

    Attributes:
        expose: "unlearn" (CUL): ascent of the loss on clean images. "shuffle" (SFFT): descent with random labels.
            "prune": units that are the least active, or most, are switched off. "noise": channels are multiplied by
            adversarial noise.
        updates: Most updates of "unlearn" and "shuffle", about; published: 20 epochs, 80 updates for 500 images.
        lr: Rate of Adam at first; left out, as published: 1e-5 for "unlearn", 1e-4 for "shuffle".
        growth: Factor on the rate for each update (ours; published: 1): the rate that moves a network depends on it.
        bn: "train" lets BatchNorm normalise with the batch and move its statistics in the updates; "frozen", as the
            published exposures, has the copy in eval mode. "prune" has no updates.
        direction: Units that "prune" switches off first; published: "least".
        layer: Layer whose outputs are the units of "prune"; left out, the features before the last linear layer.
        rule: What is scored. With C classes, "errors" (ours): e - 1/C over (1 - 1/C)/2, where e is the largest share of
            a class among the wrong predictions. "scale_free" (ours): q - 1/C over (1 - 1/C)/3 with its share q of all
            predictions, which for 10 classes has the published threshold. "variance", as published: the variance of
            the shares of all predictions over 0.01. It cannot get above 1 for 99 classes or more.
        held_out: Share of the images that the exposure does not see, and the score is of. 0 takes the same for both, as
            published.
        repeats: Exposures with other splits of the images, whose counts are added (ours; published: 1). A backdoor
            draws the predictions to the same class every time; in clean networks that class differs.
        compat: "official" does as the published code: all updates are made, whatever the accuracy; all shares are
            pruned; and noise is drawn anew for every step.
    """

    paper: ClassVar[str] = "Li et al., arXiv 2410.19427"
    scored_by: ClassVar[str] = "how far predictions on clean images gather in one class, as a multiple of the threshold"
    published_threshold: ClassVar[float | None] = 1.0
    """For all rules: scores are multiples of their thresholds."""

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "expose": "unlearn",
        "updates": 80,
        "lr": 1e-5,
        "growth": 1.0,
        "bn": "frozen",
        "rule": "variance",
        "held_out": 0.0,
        "repeats": 1,
        "compat": "official",
    }
    """The published exposure on 500 images of CIFAR-10, with the published rule. The script with that rule unlearns in
    another way: SGD at 0.005 with momentum 0.9 for 21 epochs, BatchNorm in training mode."""

    expose: Exposure = "unlearn"
    updates: int = 200
    lr: float | None = None
    growth: float = 1.04
    bn: BatchNorm = "train"
    direction: Direction = "least"
    layer: str | None = None
    rule: Rule = "errors"
    held_out: float = 0.5
    repeats: int = 3
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        choices = {"expose": Exposure, "bn": BatchNorm, "direction": Direction, "rule": Rule}
        for name, known in choices.items():
            self.check_one_of(name, *get_args(known))
        self.check_one_of("compat", None, "official")
        self.check_positive("updates", "growth", "repeats", *(() if self.lr is None else ("lr",)))
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: expected a share in [0, 1), got {self.held_out}; see its default.")
        super().__post_init__()

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Finding:
        """See `Detector.run`.

        Raises:
            ValueError: The network is no better than a constant answer, or there is no layer to prune.
            FloatingPointError: A gradient is NaN or infinite.
        """
        standings, early = [], []
        for index in range(self.repeats):
            shown, judged = self._parts(clean, run, index)
            ended = self._ended(model, shown, run)
            exposed = self._expose(model, shown, run, ended, index)
            standings.append(standing_of(exposed, judged, run))
            if self.compat is None and not ended(exposed):
                early.append(standings[-1].accuracy)
        found = sum(standings[1:], standings[0])
        shares = found.wrong_shares if self.rule == "errors" else found.shares
        notes = ["A backdoor with several targets, or one for each label, is not covered."]
        if early:
            notes.append(f"Exposures ended early, at an accuracy of {max(early):.1%}: raise updates or growth.")
        if self.rule == "errors" and int(found.wrong.sum()) < FEW:
            notes.append(f"Only {int(found.wrong.sum())} predictions are wrong: pass more images.")
        if self.rule != "errors" and statistic(found.label_shares, self.rule) > 1:
            notes.append("The images themselves are mostly of one class: pass the same number of each.")
        if self.rule == "variance" and found.classes >= 99:
            notes.append(f"The variance cannot get above its threshold with {found.classes} classes.")
        evidence = {"share of predictions": found.shares, "share of errors": found.wrong_shares}
        target = max(range(found.classes), key=lambda label: shares[label])
        return Finding(statistic(shares, self.rule), (target,), evidence, notes=tuple(notes))

    def exposed(self, model: nn.Module, clean: Batches, run: Run) -> nn.Module:
        """A copy of `model`, in eval mode, that has lost its clean task; the model is left as it was.

        Args:
            model: The suspect network.
            clean: Clean images; as many are used as in `run`.
            run: Seed, precision, progress and history.

        Raises:
            ValueError: See `run`.
            FloatingPointError: See `run`.
        """
        shown = self._parts(clean, run, 0)[0]
        copy = self._expose(model, shown, run, self._ended(model, shown, run), 0)
        for own, given in zip(copy.parameters(), model.parameters(), strict=True):
            own.requires_grad_(given.requires_grad).grad = None
        return copy.eval()

    def _parts(self, clean: Batches, run: Run, index: int) -> tuple[Batches, Batches]:
        """The images for the exposure, in batches of an update, and those for the score."""
        size = min(BATCH_SIZE, clean.batch_size)
        if not self.held_out:
            return clean.in_batches_of(size), clean
        share = min(1 - self.held_out, PASS * size / len(clean))
        shown, judged = clean.split(share, derived_seed(run.seed, "ebyd", index))
        return shown.in_batches_of(size), judged

    def _ended(self, model: nn.Module, shown: Batches, run: Run) -> Ended:
        """When an exposure has gone far enough.

        Raises:
            ValueError: The network is no better than a constant answer.
        """
        given = standing_of(model, shown, run)
        constant = given.constant_answer
        if given.accuracy <= constant:
            raise ValueError(
                f"{shown.name}: expected images on which the model is better than a constant answer, since they are to "
                f"be unlearned, got an accuracy of {given.accuracy:.1%} where the best constant answer has "
                f"{constant:.1%}; check labels, normalisation and checkpoint, or pass images of more classes."
            )
        if self.compat:
            return lambda _: False
        if self.rule == "errors":
            return ended_at(constant + KEPT * (given.accuracy - constant), shown, run, most_share=None)
        return ended_at(max(1 / given.classes + 0.05, 0.15), shown, run)

    def _expose(self, model: nn.Module, shown: Batches, run: Run, ended: Ended, index: int) -> nn.Module:
        with seeded(derived_seed(run.seed, "expose", index), shown.device), torch.enable_grad():
            return self._copy(model, shown, run, ended, f"expose {index + 1}")

    def _copy(self, model: nn.Module, shown: Batches, run: Run, ended: Ended, stage: str) -> nn.Module:
        train = self.bn == "train"
        if self.expose == "prune":
            return pruned(model, shown, run, direction=self.direction, layer=self.layer, ended=ended)
        if self.expose == "noise":
            official = self.compat is not None
            return noisy(model, shown, run, batch_statistics=train, ended=ended, stage=stage, official=official)
        if self.expose == "unlearn":
            schedule = Schedule(self.updates, self.lr or clean_unlearning.LR, self.growth, train)
            return clean_unlearning.unlearned_clean(model, shown, run, schedule, ended, stage)
        schedule = Schedule(self.updates, self.lr or label_shuffling.LR, self.growth, train)
        return label_shuffling.shuffled_labels(model, shown, run, schedule, ended, stage)
