"""Two views of a clean data set through an attack: a poisoned training set and a triggered test set."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any

import torch
from torch.utils.data import Dataset

from bdfast.attacks.base import Attack
from bdfast.data.images import ImageTensors, to_float, to_uint8

Sample = tuple[torch.Tensor, int]


def labels_of(data: Dataset[Any]) -> torch.Tensor:
    """All labels [N] of a data set, without decoding images where the set stores labels apart.

    Torchvision's sets and ImageFolder keep them in `targets`; otherwise every sample is read.
    """
    for name in ("labels", "targets"):
        stored = getattr(data, name, None)
        if stored is not None:
            return torch.as_tensor(stored).long()
    if not isinstance(data, Sized):
        raise TypeError(
            f"data: expected a data set with a length, got {type(data).__name__}; use a map-style data set."
        )
    return torch.tensor([int(data[i][1]) for i in range(len(data))])


def poisoned(data: Dataset[Any], attack: Attack, *, seed: int = 0) -> PoisonedView | ImageTensors:
    """The training set of the attacker: `poison_rate` of all images triggered and relabelled.

    They are drawn without replacement from the images of the other classes.

    Args:
        data: Map-style data set of (image [C, H, W] in [0, 1], label).
        attack: The trigger, target label and poison rate.
        seed: Of the choice of images.

    Returns:
        An `ImageTensors` for an `ImageTensors`, else a view that triggers images as they are read. Either has
        `poison_indices` [P].
    """
    labels = labels_of(data)
    candidates = (labels != attack.target).nonzero().squeeze(1)
    count = round(attack.poison_rate * len(labels))
    if count > len(candidates):
        raise ValueError(
            f"poison_rate: expected at most {len(candidates) / len(labels):.3f}, the share of images outside the "
            f"target class, got {attack.poison_rate}; lower it."
        )
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    indices = candidates[order[:count]].sort().values
    if not isinstance(data, ImageTensors):
        return PoisonedView(data, attack, indices)
    images, new_labels = data.images.clone(), labels.clone()
    images[indices] = to_uint8(attack(data.batch(indices)[0]))
    new_labels[indices] = attack.target
    result = ImageTensors(images, new_labels, data.class_names)
    result.poison_indices = indices  # type: ignore[attr-defined]
    return result


class PoisonedView(Dataset[Sample]):
    """`data` with the samples at `poison_indices` triggered and relabelled as they are read."""

    def __init__(self, data: Dataset[Any], attack: Attack, poison_indices: torch.Tensor) -> None:
        self.data, self.attack, self.poison_indices = data, attack, poison_indices
        self._poisoned = set(poison_indices.tolist())

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        image, label = self.data[index]
        if index in self._poisoned:
            return _stored(self.attack(image)), self.attack.target
        return image, int(label)


class Triggered(Dataset[tuple[torch.Tensor, int, int]]):
    """The triggered test set: (triggered image [C, H, W], target label, original label).

    Images of the target class are left out: there the attack has nothing to show (BackdoorBench, all-to-one).

    Args:
        data: Map-style data set of (image in [0, 1], label).
        attack: The trigger and its target label; or any callable on images, then give `target`.
        target: Label that the trigger shall cause; that of `attack` when left out.
    """

    def __init__(
        self,
        data: Dataset[Any],
        attack: Attack | Callable[[torch.Tensor], torch.Tensor],
        *,
        target: int | None = None,
    ) -> None:
        if target is None:
            if not isinstance(attack, Attack):
                raise ValueError("target: expected a class index beside a plain callable, got None; give target=.")
            target = attack.target
        self.data, self.attack, self.target = data, attack, target
        self.original_labels = labels_of(data)
        self.indices = (self.original_labels != target).nonzero().squeeze(1)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        source = int(self.indices[index])
        image, label = self.data[source]
        return _stored(self.attack(image)), self.target, int(label)


def _stored(image: torch.Tensor) -> torch.Tensor:
    """The image as it would come back from a file with 8 bits per channel, which is how triggers travel."""
    return to_float(to_uint8(image))
