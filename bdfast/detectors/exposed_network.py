"""Exposed models for other uses: copies that have lost the clean task and keep a backdoor, and a test of inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bdfast.data.batches import Batch, Batches
from bdfast.detectors.ebyd import EBYD
from bdfast.inversion.opening import opened
from bdfast.task import Forward, default_forward, device_of, normalized
from bdfast.training import Run
from bdfast.training.descriptions import number
from bdfast.training.modes import eval_mode
from bdfast.training.progress import Progress, as_progress


def exposed(
    model: nn.Module,
    clean: Dataset[Any] | DataLoader[Any],
    *,
    method: EBYD | None = None,
    seed: int = 0,
    batch_size: int = 256,
    amp: bool = True,
    forward: Forward = default_forward,
    progress: bool | Progress = False,
) -> nn.Module:
    """A copy of a network that has lost its clean task, and as far as EBYD is right keeps its backdoor.

        expert = bdfast.detectors.exposed(model, clean)
        suspicious = bdfast.detectors.flagged(model, expert, images)

    Args:
        model: The suspect network; its device is used, and it is left as it was.
        clean: Map-style data set of (image [C, H, W], label), or a DataLoader over one.
        method: How; left out, clean unlearning until the accuracy is near chance, or one class has more than 0.9 of the
            predictions.
        seed: Fixes all randomness.
        batch_size: For a data set; a DataLoader brings its own.
        amp: Compute in bfloat16 where the device has instructions for it.
        forward: (model, batch) -> (logits, targets).
        progress: Show progress on stderr.

    Returns:
        The copy, in eval mode.

    Raises:
        ValueError: The images do not fit the network, or it is no better than a constant answer on them.
        FloatingPointError: A gradient is NaN or infinite.
    """
    given: dict[str, Any] = {"seed": number(seed), "batch_size": batch_size, "amp": amp, "forward": forward}
    with opened(model, clean, progress=as_progress(progress), **given) as (batches, run):
        return (method or EBYD(rule="scale_free")).exposed(model, batches, run)


def flagged(
    model: nn.Module,
    expert: nn.Module,
    images: Tensor | Dataset[Any] | DataLoader[Any],
    *,
    batch_size: int = 256,
    amp: bool = True,
    forward: Forward = default_forward,
) -> Tensor:
    """Which inputs look triggered: those for which the exposed model still answers as the given one.

    Ours, after the idea of Xie et al., "BaDExpert" (ICLR 2024, arXiv 2308.12439). Clean images of the class that the
    exposed model falls back on are flagged, too. Where the exposure did not keep the backdoor, nothing is found.

    Args:
        model: The given network; it is left as it was.
        expert: What `exposed` made of it, on the same device; it is left as it was.
        images: [N, C, H, W], or a data set or DataLoader of (image, ...); labels are not looked at.
        batch_size: For images and data sets.
        amp: Compute in bfloat16 where the device has instructions for it.
        forward: (model, batch) -> (logits, ...).

    Returns:
        [N] bool on the CPU, in the order of the data.

    Raises:
        ValueError: There is no image.
    """
    data = TensorDataset(images) if isinstance(images, Tensor) else images
    batches = Batches(data, device=device_of(model), batch_size=batch_size, name="images")
    run = Run(forward=normalized(forward), amp=amp)
    return torch.cat([agrees(model, expert, batch, run).cpu() for batch in batches.ordered()])


def agrees(model: nn.Module, expert: nn.Module, batch: Batch, run: Run) -> Tensor:
    """Whether both models have the same largest logit for each sample of a batch, [B] bool; both stay as they are."""
    with eval_mode(model), eval_mode(expert), torch.inference_mode(), run.autocast(device_of(model)):
        answers = [run.forward(network, batch)[0].argmax(-1) for network in (model, expert)]
    return answers[0] == answers[1]
