"""`purify`: the public entry point of all defenses."""

from __future__ import annotations

import copy
import os
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bdfast import defenses
from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batches
from bdfast.defenses.base import Defense, Outcome
from bdfast.defenses.result import PurifyResult
from bdfast.errors import nearest
from bdfast.neurons import NeuronIndex, NeuronScores, neuron_weight_change
from bdfast.task import Forward, checked_forward, default_forward, device_of
from bdfast.training import Run, Setup, memory_format
from bdfast.training.loop import Augment
from bdfast.training.modes import eval_mode, preserved_modes
from bdfast.training.precision import computes_in_bfloat16
from bdfast.training.progress import Progress, as_progress
from bdfast.training.resumption import Checkpoints, fingerprint
from bdfast.training.seeds import seeded

AUGMENTATION = Augmentation()


def purify(
    model: nn.Module,
    clean: Dataset[Any] | DataLoader[Any],
    *,
    method: str | Defense = "tsbd",
    workdir: str | os.PathLike[str] | None = None,
    progress: bool | Progress = False,
    inplace: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    augment: Augment | None = AUGMENTATION,
    amp: bool = True,
    channels_last: bool = True,
    forward: Forward = default_forward,
    **options: Any,
) -> PurifyResult:
    """Remove a backdoor from a trained classifier with a small set of clean images, and nothing else.

    There is no parameter through which triggered or test data could come in; whatever a method has to choose, it
    chooses from `clean`.

    Args:
        model: Any classifier; its device and dtype are used.
        clean: Map-style data set of (image, label), or a DataLoader over one, of which batch size, collate function and
            workers are used. A few hundred images; 5 % of the training set in the literature.
        method: A name from `bdfast.list_methods("purify")`, or its options object.
        workdir: Folder for checkpoints. A run that was killed goes on from the last finished epoch when it is called
            again with the same arguments, and ends with the same bits.
        progress: Show progress on stderr.
        inplace: Purify `model` itself instead of a copy. If the run fails, its weights are as they were.
        seed: Fixes all randomness. The global generators are left where they were.
        batch_size: For a data set; a DataLoader brings its own.
        augment: Applied to the images of every training batch of (images, ...). The default shifts images by a few
            pixels; None is for data that is augmented already.
        amp: Compute the forward passes in bfloat16 where the device has instructions for it.
        channels_last: Lay the weights out with their channels innermost meanwhile, where convolutions are faster so.
            The first row of the history says what was done of the two.
        forward: (model, batch) -> (logits [B, K], targets [B]), for batches of another form, such as dicts.
        **options: Fields of the method's dataclass, by name. `PUBLISHED` of its class has the published ones, and those
            of the arguments above that go with them: `**{**bdfast.TSBDDefense.PUBLISHED, "batch_size": 64}`.

    Returns:
        The purified model with scores, history and the options that were used.

    Raises:
        ValueError: An argument is wrong; the message says which, what was expected, what came and what to do. Nothing
            has changed then.
        FloatingPointError: A gradient became NaN or infinite; the message names the parameter.
    """
    defense = _defense(method, options)
    device = device_of(model)
    batches = Batches(clean, device=device, batch_size=batch_size)
    _check_model(model)
    _check_clean(model, batches, forward)

    started = perf_counter()
    run = Run(seed=seed, forward=forward, augment=augment, amp=amp, progress=as_progress(progress))
    if workdir is not None:
        size = f"samples={len(batches)} batch_size={batches.batch_size}"
        description = f"{defense!r} {seed=} {augment=} {amp=} {channels_last=} {size}"
        run.checkpoints = Checkpoints(Path(workdir), fingerprint(model, description))
    target = model if inplace else copy.deepcopy(model)
    channels_last = channels_last and memory_format.channels_last_pays(model, device, amp)
    precision = "bfloat16" if amp and computes_in_bfloat16(device) else "as the weights"
    run.history.append(Setup(device.type, precision, channels_last))
    index = _index(model)
    before = copy.deepcopy(model.state_dict()) if inplace else None
    try:
        lay_out = memory_format.channels_last(target) if channels_last else nullcontext()
        with preserved_modes(target), lay_out, seeded(seed, device):
            outcome = defense.run(target, batches, run)
    except BaseException:
        if before is not None:
            model.load_state_dict(before)
        raise
    for parameter in target.parameters():
        parameter.grad = None
    scores, neurons = _scores(outcome, index, target, before or model)
    return PurifyResult(
        model=target,
        # One that is not registered goes by the name of its class.
        method=next((name for name, cls in defenses.METHODS.items() if type(defense) is cls), type(defense).__name__),
        scores=scores,
        neurons=neurons,
        history=run.history,
        options={**asdict(defense), **outcome.chosen, "seed": seed},
        found=outcome.found,
        seconds=perf_counter() - started,
    )


def _defense(method: str | Defense, options: dict[str, Any]) -> Defense:
    if isinstance(method, Defense):
        if options:
            raise ValueError(
                f"method: expected its options inside {type(method).__name__}(...), got {', '.join(options)} "
                "beside it; put them there."
            )
        return method
    methods = defenses.METHODS
    if method not in methods:
        raise ValueError(f"method: expected one of {', '.join(methods)}, got {method!r}; {nearest(method, methods)}")
    known = [field.name for field in fields(methods[method])]
    for name in options:
        if name not in known:
            raise ValueError(
                f"{name}: expected an option of {method} ({', '.join(known)}), got something else; "
                f"{nearest(name, known)}"
            )
    return methods[method](**options)


def _index(model: nn.Module) -> NeuronIndex | None:
    """The neurons of the model; None where they cannot be scored, found out before training and not after it."""
    try:
        index = NeuronIndex(model)
        index.rows(model)
    except ValueError:
        return None
    return index


def _scores(
    outcome: Outcome, index: NeuronIndex | None, model: nn.Module, given: nn.Module | dict[str, Any]
) -> tuple[NeuronScores | None, torch.Tensor | None]:
    """Scores and reset neurons, as far as the method left them out."""
    scores, neurons = outcome.scores, outcome.neurons
    if scores is None and index is not None:
        scores = neuron_weight_change(model, given, index=index)
    if neurons is None and scores is not None:
        neurons = torch.zeros_like(scores.values, dtype=torch.bool)
    return scores, neurons


def _check_model(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model: expected parameters that can be trained, got a model that is frozen throughout; call "
            "model.requires_grad_(True) first."
        )
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(
                f"model: expected finite weights, got NaN or infinity in {name}; load a checkpoint that is not damaged."
            )


def _check_clean(model: nn.Module, batches: Batches, forward: Forward) -> None:
    """One forward pass over everything finds wrong shapes and labels before hours of work do."""
    with eval_mode(model), torch.inference_mode():
        for index, batch in enumerate(batches.ordered()):
            checked_forward(model, batch, forward, f"{batches.name}: batch {index}")
