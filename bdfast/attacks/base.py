"""What every attack shares: a poison rate, a trigger that maps images to images, and what it does to labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attack(ABC):
    """An attack, all-to-one with changed labels unless its options say otherwise. Calling it applies the trigger.

    Attributes:
        target: The label that the trigger causes.
        poison_rate: Fraction of the training set that is triggered.
        targets: The label that the trigger causes for each class, in place of `target`: `all_to_all(10)` is the
            published rule of all-to-all attacks, and (1, 1, 1, 6, 6, 6) has two targets.
        clean_label: Trigger images of the target class and leave their labels as they are.
    """

    target: int = 0
    poison_rate: float = 0.1
    targets: tuple[int, ...] = ()
    clean_label: bool = False

    def __post_init__(self) -> None:
        if self.target < 0:
            raise ValueError(f"target: expected a class index >= 0, got {self.target}; choose a class.")
        if not 0 < self.poison_rate < 1:
            raise ValueError(
                f"poison_rate: expected a fraction in (0, 1), got {self.poison_rate}; 0.1 poisons a tenth."
            )
        if any(not 0 <= target < len(self.targets) for target in self.targets):
            raise ValueError(
                f"targets: expected one label for each class, all below {len(self.targets)}, got {self.targets}; "
                "all_to_all(10) is right for ten classes."
            )
        if self.clean_label and self.targets:
            raise ValueError(
                f"targets: expected none where clean_label is set, got {self.targets}; a clean-label attack has one "
                "target."
            )

    @abstractmethod
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a triggered copy in [0, 1]; the input stays as it is."""

    def poison(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What the attacker puts in place of training images [B, C, H, W] with these labels [B].

        The same trigger, except where an attack trains with another one than it is used with.
        """
        return self(images)

    def cross_count(self, poisoned: int) -> int:
        """How many more training images get a trigger that is not theirs and keep their label; 0 for most attacks."""
        return 0

    def cross(self, image: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Such an image [C, H, W]; `other` is a random image of the training set, the generator is for chance."""
        raise NotImplementedError(f"{type(self).__name__} has no cross samples")

    def victims(self, labels: torch.Tensor) -> torch.Tensor:
        """Of training images with these labels [N], which may be poisoned: [N] bool.

        Those whose label the attack changes; with `clean_label`, those of the target class.
        """
        return labels == self.target if self.clean_label else self.relabel(labels) != labels

    def relabel(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels [N] int64 -> the labels [N] that their images get with the trigger.

        An image whose label stays the same says nothing about an attack, so that `Triggered` leaves it out.

        Raises:
            ValueError: There are labels beyond the end of `targets`.
        """
        if not self.targets:
            return torch.full_like(labels, self.target)
        if len(labels) and int(labels.max()) >= len(self.targets):
            raise ValueError(
                f"targets: expected a label for each class, got {len(self.targets)} and an image of class "
                f"{int(labels.max())}; give one for every class."
            )
        return torch.tensor(self.targets, device=labels.device)[labels]


def all_to_all(num_classes: int) -> tuple[int, ...]:
    """Each class to the next one, the last to the first (Gu et al., "BadNets", arXiv 1708.06733, 2017)."""
    return (*range(1, num_classes), 0)
