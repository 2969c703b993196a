"""One look at a clean set before any work: whether it fits the model, and what it holds."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdfast.data.batches import Batches, images_of
from bdfast.task import IGNORED, Forward, checked_forward, hits
from bdfast.training.modes import eval_mode
from bdfast.training.seeds import seeded

UNIT = 1e-3
"""Values that leave [0, 1] by more than this are told."""


@dataclass(frozen=True)
class CleanSet:
    """What one pass over a clean set shows.

    Attributes:
        name: What messages call it.
        samples: How many there are.
        per_class: [K] predictions with each label.
        accuracy: Of the model.
        images: Whether the batches are (images [B, C, H, W], ...).
        limits: Least and greatest value of the images; None without.
        digest: SHA-256 of all inputs and labels, as they were read.
    """

    name: str
    samples: int
    per_class: Tensor
    accuracy: float
    images: bool
    limits: tuple[float, float] | None
    digest: str

    @property
    def constant_answer(self) -> float:
        """The accuracy of the best constant answer: chance, or the share of the most frequent label."""
        share = float(self.per_class.max()) / float(self.per_class.sum())
        return max(1 / len(self.per_class), share)

    @property
    def is_chance(self) -> bool:
        """Whether the accuracy is within two standard errors of a constant answer, or below."""
        share, count = self.constant_answer, float(self.per_class.sum())
        return self.accuracy <= share + 2 * (share * (1 - share) / count) ** 0.5

    def warnings(self) -> list[str]:
        """What speaks against deciding anything on this set."""
        found = []
        classes, known = int((self.per_class > 0).sum()), len(self.per_class)
        if classes == 1:
            found.append(
                f"{self.name}: expected images of several classes, got one only; the accuracy says nothing then. Add "
                "images of the others."
            )
        elif self.is_chance:
            found.append(
                f"{self.name}: expected a model that is better than chance on it, got an accuracy of "
                f"{self.accuracy:.1%} where a constant answer has {self.constant_answer:.1%}; check labels, "
                "normalisation (--mean, --std), and whether this is the right checkpoint."
            )
        # A text has few of all tokens.
        if 1 < classes < known and (self.images or int(self.per_class.sum()) < known):
            found.append(
                f"{self.name}: expected at least one sample per class, got none of {known - classes} of the {known}; "
                "add some, as what the network knows of them can be lost, and nothing here would show it."
            )
        return found

    def notes(self) -> list[str]:
        """What a reader of the history should know about the inputs."""
        if not self.images:
            return ["The inputs are no images [B, C, H, W]: neither shifted nor overlaid."]
        assert self.limits is not None
        low, high = self.limits
        if low < -UNIT or high > 1 + UNIT:
            return [f"The images are not in [0, 1] but in [{low:.3g}, {high:.3g}]."]
        return []


@torch.no_grad()
def inspect(model: nn.Module, batches: Batches, forward: Forward) -> CleanSet:
    """Read every sample once, with the model in eval mode.

    Raises:
        ValueError: A batch does not fit the model, or its labels do not fit the logits; the message names both.
    """
    digest = hashlib.sha256()
    per_class: Tensor | None = None
    right = total = 0
    low, high, images = float("inf"), float("-inf"), True
    with eval_mode(model):
        for index, batch in enumerate(batches.ordered()):
            logits, (targets,) = checked_forward(model, batch, forward, f"{batches.name}: batch {index}")
            counts = torch.bincount(targets[targets != IGNORED].flatten(), minlength=logits.shape[-1]).cpu()
            if per_class is None or len(counts) > len(per_class):  # pairs have as many classes as the batch samples
                per_class = (
                    counts if per_class is None else counts.index_add(0, torch.arange(len(per_class)), per_class)
                )
            else:
                per_class[: len(counts)] += counts
            hit, count = hits(logits, targets)
            right, total = right + int(hit), total + int(count)
            _update(digest, batch)
            if (pixels := images_of(batch)) is None:
                images = False
            else:
                low, high = min(low, float(pixels.min())), max(high, float(pixels.max()))
    assert per_class is not None
    if total == 0:
        raise ValueError(f"{batches.name}: expected labels that count, got {IGNORED} for all; relabel the data.")
    limits = (low, high) if images else None
    return CleanSet(batches.name, len(batches), per_class, right / total, images, limits, digest.hexdigest())


def check_repeatable(batches: Batches, seed: int) -> None:
    """Refuse samples that differ from pass to pass, which would make every later run another one.

    Raises:
        ValueError: They do.
    """
    digests = set()
    for _ in range(2):
        with seeded(seed, batches.device):
            digest = hashlib.sha256()
            _update(digest, next(iter(batches.ordered())))
            digests.add(digest.hexdigest())
    if len(digests) > 1:
        raise ValueError(
            f"{batches.name}: expected samples that are the same when they are read again, since workdir= tells runs "
            "apart by them, got others; take random changes out of the data set and pass them as augment=, or leave "
            "workdir= out."
        )


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{list(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, tuple | list):
        for part in value:
            _update(digest, part)
    else:
        digest.update(repr(value).encode())
