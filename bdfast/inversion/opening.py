"""How every search begins that a user calls: the network and the images are looked at, and a run is set up."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bdfast.data.batches import Batches
from bdfast.task import Forward, device_of, normalized
from bdfast.training import Run
from bdfast.training.clean_set import inspect
from bdfast.training.progress import Progress, Silent
from bdfast.training.seeds import seeded


@contextmanager
def opened(
    model: nn.Module,
    clean: Dataset[Any] | DataLoader[Any],
    *,
    seed: int,
    batch_size: int,
    amp: bool,
    forward: Forward,
    progress: Progress | None = None,
    name: str = "clean",
) -> Iterator[tuple[Batches, Run]]:
    """Inside, all randomness follows from the seed and gradients are on; warns of images that look wrong.

    Args:
        model: What the user gave, like all that follows.
        clean: Images.
        seed: Of the run.
        batch_size: For a data set.
        amp: Of the run.
        forward: Of the run.
        progress: Where to show progress.
        name: What the images are called in messages.

    Raises:
        ValueError: The network cannot be read, or the images do not fit it.
    """
    device = device_of(model)
    batches = Batches(clean, device=device, batch_size=batch_size, name=name)
    run = Run(seed=seed, forward=normalized(forward), amp=amp, progress=Silent() if progress is None else progress)
    with torch.inference_mode(False), torch.enable_grad(), seeded(seed, device):
        for warning in inspect(model, batches, run.forward).warnings():
            warnings.warn(warning, stacklevel=4)
        yield batches, run
