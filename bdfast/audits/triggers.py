"""What the backdoor answers to: the trigger of the attack, or a surrogate that stands in for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bdfast.attacks import Attack, Triggered
from bdfast.data.batches import Batch, Batches
from bdfast.data.images import to_float, to_uint8
from bdfast.inversion.scene import ALL_TO_ALL
from bdfast.inversion.surrogates import Surrogate
from bdfast.task import Forward, class_numbers

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images [B, C, H, W], labels [B]) -> the images with a trigger, and the labels that it leads to."""


class Trigger(ABC):
    """A trigger, and the labels that it leads to.

    Attributes:
        rate_name: What the share of images is called that it leads to its label.
    """

    rate_name: ClassVar[str] = "ASR"

    @abstractmethod
    def shown(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] with these labels [B] -> with the trigger, and the labels that it leads to."""

    def planted(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same as they would be put into a training set; some attacks train with another trigger."""
        return self.shown(images, labels)

    def victims(self, images: Tensor, labels: Tensor) -> Tensor:
        """[B] bool, the images that may be poisoned: those whose label changes, for most attacks."""
        return self.shown(images, labels)[1] != labels

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """What it is, for a file."""


class AttackTrigger(Trigger):
    """The trigger of the attack, on images in [0, 1], and the labels that the view measures.

    Args:
        view: The triggered test set of the attack. A target of its own takes the place of the labels of the attack.
    """

    def __init__(self, view: Triggered) -> None:
        self.attack = view.attack
        self._target = int(view.targets[0])
        # What is planted has to lead where the view measures.
        self._own = view.attack if isinstance(view.attack, Attack) and _leads(view.attack, view) else None

    def shown(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Trigger`; pixels are rounded to 8 bits, as `Triggered` has them."""
        return _stored(self.attack(images), images), self._relabelled(labels)

    def planted(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Trigger`."""
        changed = self.attack.poison(images, labels) if isinstance(self.attack, Attack) else self.attack(images)
        return _stored(changed, images), self._relabelled(labels)

    def victims(self, images: Tensor, labels: Tensor) -> Tensor:
        """See `Trigger`; for a clean-label attack, the images of the target class."""
        return labels != self._target if self._own is None else self._own.victims(labels)

    def as_json(self) -> dict[str, Any]:
        """The class of the attack and its target label."""
        many = () if self._own is None else self._own.targets
        return {"kind": "attack", "name": type(self.attack).__name__, "target": list(many) if many else self._target}

    def _relabelled(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self._target) if self._own is None else self._own.relabel(labels)


class SurrogateTrigger(Trigger):
    """A guess at the trigger of `before`, where there is no triggered data.

    Args:
        surrogate: The guess.
        before: The network that it was fitted on; in eval mode when it is asked.
        forward: (model, batch) -> (logits, targets).
    """

    rate_name = "surrogate rate"

    def __init__(self, surrogate: Surrogate, before: nn.Module, forward: Forward) -> None:
        self.surrogate, self._before, self._forward = surrogate, before, forward

    def shown(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Trigger`. One with a target for each label leads where `before` says that it does."""
        changed = self.surrogate(images)
        if self.surrogate.target != ALL_TO_ALL:
            return changed, torch.full_like(labels, self.surrogate.target)
        with torch.no_grad():
            return changed, self._forward(self._before, (changed, labels))[0].argmax(1).to(labels.dtype)

    def as_json(self) -> dict[str, Any]:
        """The kind of the guess and its target label; -1 for one with a target for each label."""
        return {"kind": "surrogate", "name": self.surrogate.kind, "target": self.surrogate.target}


class Shown(Batches):
    """Batches of (triggered image, target label, original label) made from those of (image, label).

    Images that have the target label anyway are left out. Nothing is held in memory. Both labels are int64 [B].

    Args:
        batches: Clean images with labels, in any form that `bdfast.task.normalized` takes.
        change: What is done to them.
    """

    def __init__(self, batches: Batches, change: Change) -> None:
        self.__dict__.update(batches.__dict__)
        self.name, self._change = "triggered", change

    def ordered(self) -> Iterator[Batch]:
        """See `Batches`; a batch without such images is skipped."""
        for _, (images, given, *_) in self.numbered():
            labels = labels_for(images, given)
            changed, targets = self._change(images, labels)
            kept = targets != labels
            if bool(kept.any()):
                yield changed[kept], targets[kept], labels[kept]


class Poisoned(Batches):
    """The same batches with some of the samples triggered and relabelled, as an attacker puts them in.

    Labels keep their dtype and shape, so that the user's `forward` gets what it knows.

    Args:
        batches: Clean images with labels, in any form that `bdfast.task.normalized` takes.
        trigger: The trigger.
        count: How many; all that can be poisoned, if there are fewer.
        seed: Of their choice.

    Attributes:
        chosen: [P] numbers of the poisoned samples, as `Batches.numbered` gives them.
    """

    def __init__(self, batches: Batches, trigger: Trigger, count: int, seed: int) -> None:
        self.__dict__.update(batches.__dict__)
        self._trigger = trigger
        candidates = []
        for numbers, (images, labels, *_) in batches.numbered():
            candidates.append(numbers[trigger.victims(images, labels_for(images, labels)).cpu()])
        possible = torch.cat(candidates)
        if not len(possible):
            raise ValueError(
                f"{self.name}: expected images that can be poisoned, those of other classes than the target for most "
                "attacks, got none; pass images of all classes."
            )
        order = torch.randperm(len(possible), generator=torch.Generator().manual_seed(seed))
        self.chosen = possible[order[:count]].sort().values

    def _read(self, chunks: list[Tensor], seed: int) -> Iterator[tuple[Tensor, Batch]]:
        for numbers, batch in super()._read(chunks, seed):
            poison = torch.isin(numbers, self.chosen).to(self.device)
            if not bool(poison.any()):
                yield numbers, batch
                continue
            images, labels, *rest = batch
            images, labels = images.clone(), labels.clone()
            changed, targets = self._trigger.planted(images[poison], labels_for(images, labels)[poison])
            images[poison] = changed
            labels[poison] = targets.to(labels.dtype).reshape(labels[poison].shape)
            yield numbers, (images, labels, *rest)


def labels_for(images: Tensor, labels: Tensor) -> Tensor:
    """The labels of images [B, C, H, W] as int64 [B]; they may be [B, 1], or of another type, if whole numbers.

    Raises:
        ValueError: They are no whole numbers.
    """
    return class_numbers(labels, images.flatten(1))


def _leads(attack: Attack, view: Triggered) -> bool:
    """Whether the labels of the view are those of its attack."""
    try:
        return torch.equal(attack.relabel(view.original_labels), view.targets)
    except ValueError:  # the attack has no label for some class
        return False


def _stored(changed: Tensor, like: Tensor) -> Tensor:
    return to_float(to_uint8(changed)).to(like)
