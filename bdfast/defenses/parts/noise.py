"""Unlearning of noise: gradient ascent on random images with random labels, which needs no data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bdfast.data.batches import Batches
from bdfast.defenses.parts.ascent import lowered, unlearned_as_published
from bdfast.task import device_of
from bdfast.training import Run
from bdfast.training.seeds import derived_seed


@dataclass(frozen=True)
class Noise(Dataset[tuple[Tensor, int]]):
    """Uniform noise in [0, 1] with random labels, each drawn when it is asked for, always the same."""

    shape: tuple[int, ...]
    classes: int
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        draws = torch.Generator().manual_seed(derived_seed(self.seed, "noise", number))
        return torch.rand(self.shape, generator=draws), int(torch.randint(self.classes, (), generator=draws))


def unlearned_noise(model: nn.Module, noise: Noise, run: Run, *, lr: float, batch_size: int) -> nn.Module:
    """A copy of `model` after ascent on all the noise, with SGD and a momentum of 0.9.

    Raises:
        FloatingPointError: It became NaN or infinite, at lower rates too; a network without normalisation has no bound.
    """
    data = Batches(noise, device=device_of(model), batch_size=batch_size, name="noise")
    plain = replace(run, augment=None)  # noise needs no augmentation, which is made for images

    def attempt(lower: float) -> nn.Module:
        ascent = partial(torch.optim.SGD, lr=lr * lower, momentum=0.9, maximize=True)
        return unlearned_as_published(model, data, plain, ascent, ended=lambda *_: False, epochs=1)

    copy = lowered(attempt)
    run.updates = plain.updates
    return copy


def shape_of(clean: Batches) -> tuple[int, ...]:
    """The shape of a clean image.

    Raises:
        ValueError: The batches are not (images, labels).
    """
    batch = next(iter(clean.ordered()))
    images = batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise ValueError(
            f"{clean.name}: expected batches of (images, labels), which noise can stand in for, got a "
            f"{type(batch).__name__} of another kind; take a method that works without noise."
        )
    return tuple(images.shape[1:])
