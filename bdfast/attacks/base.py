"""What every attack shares: a target label, a poison rate, and a trigger that maps images to images."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attack(ABC):
    """An all-to-one attack. Calling it applies the trigger.

    Attributes:
        target: The label that triggered images shall get.
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
