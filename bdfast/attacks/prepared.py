"""Attacks whose trigger is made with a network of the attacker's own."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from bdfast.attacks.base import Attack
from bdfast.data.batches import Batch, Batches, images_of
from bdfast.task import at_least_float32, device_of, logits_of
from bdfast.training.copies import copy_of
from bdfast.training.precision import autocast
from bdfast.training.seeds import derived_seed, seeded

Self = TypeVar("Self", bound="PreparedAttack")


@dataclass(frozen=True)
class PreparedAttack(Attack):
    """An attack that must see a network and training images before it has a trigger.

    Attributes:
        state: What `prepare` has found, by name. An attack without it can be asked for everything but its trigger.
    """

    state: Mapping[str, torch.Tensor] | None = field(
        default=None, repr=False, compare=False, metadata={"option": False}
    )

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
        """A tensor of the state; errors as for `known_state`."""
        return self.known_state()[name]

    def known_state(self) -> Mapping[str, torch.Tensor]:
        """The state.

        Raises:
            ValueError: There is no state yet.
        """
        if self.state is None:
            raise ValueError(
                f"attack: expected a {type(self).__name__} with its trigger, got one without; call "
                "attack.prepared(network, data) first."
            )
        return self.state

    def check_shape(self, images: torch.Tensor, expected: Sequence[int]) -> None:
        """See that images [..., C, H, W] have the shape that the trigger was made for.

        Args:
            images: Any images.
            expected: The last dimensions that they shall have; -1 for any size.

        Raises:
            ValueError: They have not.
        """
        got = images.shape[images.ndim - len(expected) :]
        if len(got) != len(expected) or any(size not in (-1, own) for size, own in zip(expected, got, strict=True)):
            sizes = ", ".join("any" if size == -1 else str(size) for size in expected)
            raise ValueError(
                f"images: expected [..., {sizes}], the shape that the trigger was made for, got {list(images.shape)}; "
                "call attack.prepared(network, data) with images of this shape."
            )


@contextmanager
def attacker(network: nn.Module, data: Dataset[Any], seed: int) -> Iterator[tuple[nn.Module, Batches]]:
    """What `prepare` works with: a float32 copy of the network in eval mode and without gradients, and the data.

    Inside, gradients are on, whatever the caller has set, and torch's generators start from `seed`.
    """
    device = device_of(network)
    with torch.inference_mode(False), torch.enable_grad(), seeded(seed, device):
        yield (
            copy_of(network).float().eval().requires_grad_(False),
            Batches(data, device=device, batch_size=128, name="data"),
        )


def answers(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits [B, K] float32 for images [B, C, H, W]; computed in bfloat16 where the device does that."""
    with autocast(images.device, True):
        logits = logits_of(network(images))
    return at_least_float32(logits)


def image_pairs(batches: Iterable[Batch], name: str = "data") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(images [B, C, H, W] float32, labels [B] int64) of each batch.

    Raises:
        ValueError: A batch holds something else.
    """
    for batch in batches:
        if (images := images_of(batch)) is None:
            raise ValueError(
                f"{name}: expected batches of (images [B, C, H, W], labels), got {type(batch).__name__}; this attack "
                "changes pixels, so give images by themselves."
            )
        yield images.float(), batch[1].long()


def endless(batches: Batches, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The pairs of `image_pairs` without end, shuffled anew in every pass."""
    passes = 0
    while True:
        yield from image_pairs(batches.shuffled(derived_seed(seed, "pass", passes)), batches.name)
        passes += 1


def some_images(batches: Batches, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to `count` images [N, C, H, W] and their labels [N], drawn by `seed`."""
    wanted = min(count, len(batches))
    images: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for some, true in endless(batches, seed):
        images.append(some)
        labels.append(true)
        if sum(map(len, images)) >= wanted:
            break
    return torch.cat(images)[:count], torch.cat(labels)[:count]
