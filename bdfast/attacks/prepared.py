"""Attacks whose trigger is made with a network of the attacker's own."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from bdfast.attacks.base import Attack

Self = TypeVar("Self", bound="PreparedAttack")


@dataclass(frozen=True)
class PreparedAttack(Attack):
    """An attack that must see a network and training images before it has a trigger.

    Attributes:
        state: What `prepare` has found, by name. An attack without it can be asked for everything but its trigger.
    """

    state: Mapping[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @abstractmethod
    def prepare(self, network: nn.Module, data: Dataset[Any], *, seed: int = 0) -> Mapping[str, torch.Tensor]:
        """Find the trigger.

        Args:
            network: Trained on clean images of the same kind, in the attacker's hands; it is not changed.
            data: The attacker's training images, before poisoning.
            seed: Of everything that is drawn at random.

        Returns:
            The state.
        """

    def prepared(self: Self, network: nn.Module, data: Dataset[Any], *, seed: int = 0) -> Self:
        """This attack with its trigger; arguments as for `prepare`."""
        return self.with_state(self.prepare(network, data, seed=seed))

    def with_state(self: Self, state: Mapping[str, torch.Tensor]) -> Self:
        """This attack with the trigger of an earlier `prepare`."""
        return dataclasses.replace(self, state=dict(state))

    def found(self, name: str) -> torch.Tensor:
        """A tensor of the state.

        Raises:
            ValueError: There is no state yet.
        """
        if self.state is None:
            raise ValueError(
                f"attack: expected a {type(self).__name__} with its trigger, got one without; call "
                "attack.prepared(network, data) first."
            )
        return self.state[name]
