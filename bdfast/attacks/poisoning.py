"""Two views of a clean data set through an attack: a poisoned training set and a triggered test set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from bdfast.attacks.base import Attack
from bdfast.data.images import ImageTensors, to_float, to_uint8
from bdfast.data.labels import labels_of

Sample = tuple[torch.Tensor, int]


def poisoned(data: Dataset[Any], attack: Attack, *, seed: int = 0) -> PoisonedView | ImageTensors:
    """The training set of the attacker: `poison_rate` of all images triggered and relabelled.

    They are drawn without replacement from the images that `attack.victims` allows: those of the other classes, most
    often.

    Args:
        data: Map-style data set of (image [C, H, W] in [0, 1], label).
        attack: The trigger, target label and poison rate.
        seed: Of the choice of images.

    Returns:
        An `ImageTensors` for an `ImageTensors`, else a view that triggers images as they are read. Either has
        `poison_indices` [P].
    """
    labels = labels_of(data)
    candidates = attack.victims(labels).nonzero().squeeze(1)
    count = round(attack.poison_rate * len(labels))
    if count > len(candidates):
        raise ValueError(
            f"poison_rate: expected at most {len(candidates) / len(labels):.3f}, the share of images that the attack "
            f"can poison, got {attack.poison_rate}; lower it."
        )
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    indices = candidates[order[:count]].sort().values
    if not isinstance(data, ImageTensors):
        return PoisonedView(data, attack, indices, attack.relabel(labels[indices]))
    images, new_labels = data.images.clone(), labels.clone()
    images[indices] = to_uint8(attack(data.batch(indices)[0]))
    new_labels[indices] = attack.relabel(labels[indices])
    result = ImageTensors(images, new_labels, data.class_names)
    result.poison_indices = indices  # type: ignore[attr-defined]
    return result


class PoisonedView(Dataset[Sample]):
    """`data` with the samples at `poison_indices` triggered and relabelled as they are read."""

    def __init__(
        self, data: Dataset[Any], attack: Attack, poison_indices: torch.Tensor, new_labels: torch.Tensor
    ) -> None:
        self.data, self.attack, self.poison_indices = data, attack, poison_indices
        self._new_labels = dict(zip(poison_indices.tolist(), new_labels.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        image, label = self.data[index]
        if index in self._new_labels:
            return _stored(self.attack(image)), self._new_labels[index]
        return image, int(label)


class Triggered(Dataset[tuple[torch.Tensor, int, int]]):
    """The triggered test set: (triggered image [C, H, W], target label, original label).

    Images whose label the attack would not change are left out: the attack cannot be measured on them (BackdoorBench).

    Args:
        data: Map-style data set of (image in [0, 1], label).
        attack: The trigger and its labels; or any callable on images, then give `target`.
        target: Label that the trigger shall cause, for a plain callable.
    """

    def __init__(
        self,
        data: Dataset[Any],
        attack: Attack | Callable[[torch.Tensor], torch.Tensor],
        *,
        target: int | None = None,
    ) -> None:
        labels = labels_of(data)
        if target is not None:
            targets = torch.full_like(labels, target)
        elif isinstance(attack, Attack):
            targets = attack.relabel(labels)
        else:
            raise ValueError("target: expected a class index beside a plain callable, got None; give target=.")
        self.data, self.attack = data, attack
        self.indices = (labels != targets).nonzero().squeeze(1)
        self.original_labels, self.targets = labels[self.indices], targets[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        image, label = self.data[int(self.indices[index])]
        return _stored(self.attack(image)), int(self.targets[index]), int(label)


def _stored(image: torch.Tensor) -> torch.Tensor:
    """The image as it would come back from a file with 8 bits per channel, which is how triggers travel."""
    return to_float(to_uint8(image))
