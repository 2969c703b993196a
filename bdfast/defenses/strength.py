"""A strength that is chosen from clean data where it was left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from bdfast.data.batches import Batches
from bdfast.defenses.base import Defense
from bdfast.selection import choose_strength
from bdfast.training import Run

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ChosenStrength(Defense):
    """A method with one option that says how aggressive it is, and that `bdfast.selection` chooses when it is None.

    Attributes:
        strength: Name of that option.
        ladder: Its values to choose from, weak to strong.
        max_accuracy_drop: Budget of clean accuracy for the choice, as a fraction, counted from the weakest setting:
            fine-tuning has a price of its own.
    """

    strength: ClassVar[str]
    ladder: ClassVar[Sequence[float]]

    max_accuracy_drop: float = 0.01

    def __post_init__(self) -> None:
        self.check_positive("max_accuracy_drop")
        super().__post_init__()

    def settled(
        self,
        given: nn.Module,
        clean: Batches,
        run: Run,
        attempt: Callable[[Self, nn.Module, Batches, str], None],
    ) -> tuple[Self, dict[str, Any]]:
        """These options with a strength, and by name what had to be chosen for that.

        Args:
            given: The original model; only read.
            clean: The clean set.
            run: Seed, history and checkpoints.
            attempt: (options, model, images, stage): a short purification of the model, in place, with these options.
        """
        if getattr(self, self.strength) is not None:
            return self, {}

        value = choose_strength(
            self.strength,
            self.ladder,
            lambda value, *rest: attempt(self._with_strength(value), *rest),
            given,
            clean,
            run,
            max_accuracy_drop=self.max_accuracy_drop,
        )
        return self._with_strength(value), {self.strength: value}

    def _with_strength(self, value: float) -> Self:
        options: dict[str, Any] = {self.strength: value}
        return replace(self, **options)
