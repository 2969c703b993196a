"""Two views of a clean data set through an attack: a poisoned training set and a triggered test set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from bdfast.attacks.base import Attack
from bdfast.data.images import ImageTensors, to_float, to_uint8
from bdfast.data.labels import labels_of
from bdfast.training.seeds import derived_seed

Sample = tuple[torch.Tensor, int]
AT_ONCE = 1000
"""Images that are triggered in one call, so that no copy of a whole set in float32 is held."""


def poisoned(data: Dataset[Any], attack: Attack, *, seed: int = 0) -> PoisonedView | ImageTensors:
    """The training set of the attacker: `poison_rate` of all images triggered and relabelled.

    They are drawn without replacement from the images that `attack.victims` allows: those of the other classes, most
    often. Attacks with cross samples change some of the remaining images too, and leave their labels.

    Args:
        data: Map-style data set of (image [C, H, W] in [0, 1], label).
        attack: The trigger, target label and poison rate.
        seed: Of the choice of images, and of the cross samples.

    Returns:
        An `ImageTensors` for an `ImageTensors`, else a view that triggers images as they are read. Either has
        `poison_indices` [P] and `cross_indices` [X].

    Raises:
        ValueError: There are fewer images that the attack can poison than `poison_rate` asks for.
    """
    view = PoisonedView(data, attack, seed=seed)
    if not isinstance(data, ImageTensors):
        return view
    images, labels = data.images.clone(), data.labels.clone()
    for indices in view.poison_indices.split(AT_ONCE):
        clean, true = data.batch(indices)
        images[indices] = to_uint8(attack.poison(clean, true))
    labels[view.poison_indices] = attack.relabel(labels[view.poison_indices])
    for index in view.cross_indices.tolist():
        images[index] = to_uint8(view[index][0])
    result = ImageTensors(images, labels, data.class_names)
    result.poison_indices, result.cross_indices = view.poison_indices, view.cross_indices  # type: ignore[attr-defined]
    return result


class PoisonedView(Dataset[Sample]):
    """`data` with the samples at `poison_indices` triggered and relabelled as they are read.

    The samples at `cross_indices` get a trigger that is not theirs and keep their label. Arguments and errors as for
    `poisoned`.
    """

    def __init__(self, data: Dataset[Any], attack: Attack, *, seed: int = 0) -> None:
        labels = labels_of(data)
        candidates = attack.victims(labels).nonzero().squeeze(1)
        count = round(attack.poison_rate * len(labels))
        if count > len(candidates):
            raise ValueError(
                f"poison_rate: expected at most {len(candidates) / len(labels):.3f}, the share of images that the "
                f"attack can poison, got {attack.poison_rate}; lower it."
            )
        chosen = candidates[_order(len(candidates), seed)[:count]]
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[chosen] = False
        others = rest.nonzero().squeeze(1)
        cross = others[_order(len(others), derived_seed(seed, "cross"))[: attack.cross_count(count)]]
        self.data, self.attack = data, attack
        self.poison_indices, self.cross_indices = chosen.sort().values, cross.sort().values
        new_labels = attack.relabel(labels[self.poison_indices])
        self._new_labels = dict(zip(self.poison_indices.tolist(), new_labels.tolist(), strict=True))
        self._cross = set(self.cross_indices.tolist())
        self._seed = seed

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        image, label = self.data[index][:2]
        if index in self._new_labels:
            triggered = self.attack.poison(image.unsqueeze(0), torch.tensor([int(label)])).squeeze(0)
            return _stored(triggered), self._new_labels[index]
        if index in self._cross:
            generator = torch.Generator().manual_seed(derived_seed(self._seed, "cross", index))
            other = self.data[int(torch.randint(len(self), (), generator=generator))][0]
            return _stored(self.attack.cross(image, other, generator)), int(label)
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
        image, label = self.data[int(self.indices[index])][:2]
        return _stored(self.attack(image)), int(self.targets[index]), int(label)


def _order(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _stored(image: torch.Tensor) -> torch.Tensor:
    """The image as it would come back from a file with 8 bits per channel, which is how triggers travel."""
    return to_float(to_uint8(image))
