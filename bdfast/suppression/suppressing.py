"""`suppress`: the public entry point of all methods that train on suspicious data."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bdfast import suppression
from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batches
from bdfast.defenses.preflight import check_model, try_training
from bdfast.method_options import method_of, name_of
from bdfast.suppression.base import Suppressed, Suppression
from bdfast.suppression.suppress_result import SuppressResult
from bdfast.task import Forward, default_forward, device_of, normalized
from bdfast.training import Run, Setup, memory_format
from bdfast.training.clean_set import CleanSet, check_repeatable, inspect
from bdfast.training.copies import copy_of
from bdfast.training.descriptions import described, number, plain
from bdfast.training.loop import Augment
from bdfast.training.modes import preserved_modes
from bdfast.training.precision import computes_in_bfloat16
from bdfast.training.progress import Progress, as_progress
from bdfast.training.resumption import Checkpoints, fingerprint
from bdfast.training.seeds import seeded

AUGMENTATION = Augmentation()

Truth = torch.Tensor | np.ndarray | Sequence[int] | Sequence[bool]


def suppress(
    model: nn.Module,
    suspicious: Dataset[Any] | DataLoader[Any],
    *,
    method: str | Suppression = "abl",
    workdir: str | os.PathLike[str] | None = None,
    progress: bool | Progress = False,
    inplace: bool = False,
    seed: int = 0,
    batch_size: int = 128,
    augment: Augment | None = AUGMENTATION,
    amp: bool = True,
    channels_last: bool = True,
    forward: Forward = default_forward,
    truth: Truth | None = None,
    **options: Any,
) -> SuppressResult:
    """Train a classifier on data that may be poisoned, so that it learns the task and not the backdoor.

    No clean data is needed, and none is used.

    Args:
        model: An untrained network, or any start; its device and dtype are used.
        suspicious: Map-style data set of (image, label), or a DataLoader over one, whose sampler says which samples are
            used and whose batch size, collate function and workers are taken over.
        method: A name from `bdfast.suppression.METHODS`, or its options object.
        workdir: Folder for checkpoints. A run that was killed goes on from the last finished epoch when it is called
            again with the same arguments and samples, and ends with the same bits.
        progress: Show progress on stderr.
        inplace: Train `model` itself instead of a copy. If the run fails, its weights are as they were.
        seed: Fixes all randomness. The global generators are left where they were.
        batch_size: For a data set; a DataLoader brings its own.
        augment: Applied to the images of every training batch of (images, ...). The default shifts images by a few
            pixels; None is for data that is augmented already.
        amp: Compute the forward passes of training in bfloat16 where the device has instructions for it.
        channels_last: Lay the weights out with their channels innermost meanwhile, where convolutions are faster so.
        forward: (model, batch) -> (logits [B, K], targets [B]), for batches of another form, such as dicts.
        truth: Which samples are poisoned, where that is known: [N] bool, or their indices. It gives the result its
            `precision` and enters nothing else.
        **options: Fields of the method's dataclass, by name. `PUBLISHED` of its class has the published ones, and those
            of the arguments above that go with them.

    Returns:
        The trained network, the samples that the method suspects, the history and the options that were used.

    Warns:
        UserWarning: The data has one class only or none of some, or the network has not learned it. The method may warn
            as well. `SuppressResult.warnings` holds the same.

    Raises:
        ValueError: An argument is wrong; the message says which, what was expected, what came and what to do. Nothing
            was changed then.
        TypeError: `suspicious` is a stream, or a loader that makes its batches by other means than a DataLoader does.
        FloatingPointError: A gradient became NaN or infinite; the message names the parameter.
    """
    chosen = method_of(method, options, suppression.METHODS, Suppression)
    seed = number(seed)
    device = device_of(model)
    batches = Batches(suspicious, device=device, batch_size=batch_size, name="suspicious")
    poisoned = None if truth is None else _poisoned(truth, suspicious)
    check_model(model)
    run = Run(seed=seed, forward=normalized(forward), augment=augment, amp=amp, progress=as_progress(progress))
    # Scripts are often decorated with no_grad or inference_mode as a whole.
    with torch.inference_mode(False), torch.enable_grad():
        with seeded(seed, device):
            facts = inspect(model, batches, run.forward)
        with seeded(seed, device):
            try_training(model, batches, run.forward)
        if workdir is not None:
            check_repeatable(batches, seed)
            given = {"augment": augment, "forward": forward, "collate_fn": batches.collate}
            functions = [described(value, name) for name, value in given.items()]
            size = batches.batch_size
            settings = f"{chosen!r} {seed=} {amp=} {channels_last=} batch_size={size} {functions} {facts.digest}"
            run.checkpoints = Checkpoints(Path(workdir), fingerprint(model, settings))
        return _suppress(model, chosen, batches, run, facts, poisoned, inplace=inplace, channels_last=channels_last)


def _suppress(
    model: nn.Module,
    method: Suppression,
    batches: Batches,
    run: Run,
    facts: CleanSet,
    poisoned: torch.Tensor | None,
    *,
    inplace: bool,
    channels_last: bool,
) -> SuppressResult:
    started = perf_counter()
    target = model if inplace else copy_of(model)
    channels_last = channels_last and memory_format.channels_last_pays(model, batches.device, run.amp)
    precision = "bfloat16" if run.amp and computes_in_bfloat16(batches.device) else "as the weights"
    run.history.append(Setup(batches.device.type, precision, channels_last, tuple(facts.notes())))
    before = copy.deepcopy(model.state_dict()) if inplace else None
    try:
        lay_out = memory_format.channels_last(target) if channels_last else nullcontext()
        with preserved_modes(target), lay_out, seeded(run.seed, batches.device):
            method.check(target, batches, run)
            outcome = method.run(target, batches, run)
            reached = run.accuracy(target, batches)
    except BaseException:
        if before is not None:
            model.load_state_dict(before)
        raise
    finally:
        for parameter in target.parameters():
            parameter.grad = None
    told = _warnings(facts, reached, outcome)
    for warning in told:
        warnings.warn(warning, stacklevel=3)
    return SuppressResult(
        model=target,
        method=name_of(method, suppression.METHODS),
        suspected=outcome.suspected,
        precision=None if poisoned is None else float(poisoned[outcome.suspected].double().mean()),
        history=run.history,
        options=plain({**asdict(method), **outcome.chosen, "seed": run.seed}),
        found=plain(outcome.found),
        seconds=perf_counter() - started,
        updates=run.updates,
        warnings=told,
    )


def _poisoned(truth: Truth, suspicious: Dataset[Any] | DataLoader[Any]) -> torch.Tensor:
    """[N] bool over the whole data set, as `suspected` counts in it."""
    size = len(suspicious.dataset if isinstance(suspicious, DataLoader) else suspicious)  # type: ignore[arg-type]
    given = torch.as_tensor(truth).cpu()
    if given.dtype == torch.bool and given.shape == (size,):
        return given
    poisoned = torch.zeros(size, dtype=torch.bool)
    if given.numel() == 0 and given.ndim == 1 and given.dtype != torch.bool:
        return poisoned
    whole = given.ndim == 1 and given.dtype != torch.bool and not given.is_floating_point()
    if not whole or int(given.min()) < 0 or int(given.max()) >= size or len(given.unique()) < len(given):
        raise ValueError(
            f"truth: expected [{size}] bool, one for each sample of the data set, or indices below {size}, each once, "
            f"got {given.dtype} {list(given.shape)}; `poison_indices` of a poisoned set are right."
        )
    poisoned[given.long()] = True
    return poisoned


def _warnings(facts: CleanSet, reached: float, outcome: Suppressed) -> list[str]:
    """What speaks against the result; `reached` is the accuracy on the training data."""
    told = []
    counts, share = facts.per_class, facts.constant_answer
    classes, samples = int((counts > 0).sum()), float(counts.sum())
    if classes == 1:
        told.append(
            "suspicious: expected samples of several classes, got one only; there is nothing to learn. Add samples of "
            "the others."
        )
    elif reached <= share + 2 * (share * (1 - share) / samples) ** 0.5:
        told.append(
            f"model: expected to learn the training data, got an accuracy of {reached:.1%} on it where a constant "
            f"answer has {share:.1%}; lower the learning rate (lr), or give it more epochs."
        )
    # A text has few of all tokens.
    if facts.images and 1 < classes < len(counts):
        told.append(
            f"suspicious: expected at least one sample per class, got none of {len(counts) - classes} of the "
            f"{len(counts)}; add some, or take a network with fewer outputs."
        )
    return [*told, *outcome.warnings]
