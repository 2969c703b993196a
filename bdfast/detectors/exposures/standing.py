"""What a network answers on clean images: how many are right, and how the predictions spread over the classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batches
from bdfast.training import Run
from bdfast.training.modes import eval_mode

Ended = Callable[[nn.Module], bool]
"""Asked by an exposure from time to time, with the network as it is; True ends it."""

MOST_SHARE = 0.9
"""Share of one class among the predictions at which an exposure ends (ours)."""


@dataclass(frozen=True, eq=False)
class Standing:
    """Counts over a clean set; labels that are ignored do not count.

    Attributes:
        predicted: [K] int64, predictions of each class.
        wrong: [K] int64, those of them that are wrong.
        labels: [K] int64, samples with each label.
    """

    predicted: Tensor
    wrong: Tensor
    labels: Tensor

    def __add__(self, other: Standing) -> Standing:
        """Both passes counted together."""
        return Standing(self.predicted + other.predicted, self.wrong + other.wrong, self.labels + other.labels)

    @property
    def classes(self) -> int:
        """K."""
        return len(self.predicted)

    @property
    def accuracy(self) -> float:
        """Share of the right predictions."""
        return 1 - float(self.wrong.sum()) / float(self.labels.sum())

    @property
    def constant_answer(self) -> float:
        """The accuracy of the best constant answer: chance, or the share of the most frequent label."""
        return max(1 / self.classes, float(self.labels.max()) / float(self.labels.sum()))

    @property
    def shares(self) -> list[float]:
        """Of each class, its share of the predictions."""
        return shares_of(self.predicted)

    @property
    def label_shares(self) -> list[float]:
        """Of each class, its share of the labels."""
        return shares_of(self.labels)

    @property
    def wrong_shares(self) -> list[float]:
        """Of each class, its share of the wrong predictions; 0 where none is wrong."""
        return shares_of(self.wrong)


def shares_of(counts: Tensor) -> list[float]:
    """Counts [K] -> shares; all 0 where nothing was counted."""
    return (counts.double() / max(1, int(counts.sum()))).tolist()


def standing_of(model: nn.Module, images: Batches, run: Run) -> Standing:
    """One pass over `images` with the model in eval mode; the model is left as it was.

    Raises:
        ValueError: Not one label counts.
    """
    counts: Tensor | None = None
    with eval_mode(model), torch.inference_mode(), run.autocast(images.device):
        for batch in images.ordered():
            logits, targets = run.forward(model, batch)
            counted = targets != task.IGNORED
            answers, labels, classes = logits.argmax(-1)[counted], targets[counted], logits.shape[-1]
            rows = [torch.bincount(x, minlength=classes) for x in (answers, answers[answers != labels], labels)]
            counts = torch.stack(rows) if counts is None else counts + torch.stack(rows)
    if counts is None or not int(counts[2].sum()):
        raise ValueError(f"{images.name}: expected labels that count, got {task.IGNORED} for all; relabel the data.")
    return Standing(*counts.cpu().unbind())


def ended_at(floor: float, images: Batches, run: Run, *, most_share: float | None = MOST_SHARE) -> Ended:
    """True once the accuracy on `images` is at most `floor`, or one class has more than `most_share` of the answers."""

    def ended(model: nn.Module) -> bool:
        now = standing_of(model, images, run)
        return now.accuracy <= floor or (most_share is not None and max(now.shares) > most_share)

    return ended
