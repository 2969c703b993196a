"""What every attack shares: a poison rate, a trigger that maps images to images, and what it does to labels."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attack(ABC):
    """An attack, all-to-one unless a subclass says otherwise. Calling it applies the trigger.

    Attributes:
        target: The label assigned to triggered images.
        poison_rate: Fraction of the training set that is triggered and relabelled.
    """

    target: int = 0
    poison_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.target < 0:
            raise ValueError(f"target: expected a class index >= 0, got {self.target}; choose a class.")
        if not 0 < self.poison_rate < 1:
            raise ValueError(
                f"poison_rate: expected a fraction in (0, 1), got {self.poison_rate}; 0.1 poisons a tenth."
            )

    @abstractmethod
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a triggered copy in [0, 1]; the input stays as it is."""

    def victims(self, labels: torch.Tensor) -> torch.Tensor:
        """Of training images with these labels [N], which may be poisoned: [N] bool.

        Here those of the other classes. A clean-label attack poisons those of the target class; an all-to-all attack
        poisons any.
        """
        return labels != self.target

    def relabel(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels [N] int64 -> the labels [N] that their images get with the trigger.

        Here the target label. An image whose label stays the same says nothing about an attack, so that `Triggered`
        leaves it out.
        """
        return torch.full_like(labels, self.target)
