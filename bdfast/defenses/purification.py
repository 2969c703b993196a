"""`purify`: the public entry point of all defenses."""

from __future__ import annotations

import copy
import os
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bdfast import defenses
from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batches
from bdfast.defenses.base import DataFree, Defense, Outcome
from bdfast.defenses.preflight import check_model, try_training
from bdfast.defenses.result import PurificationError, PurifyResult
from bdfast.method_options import method_of, name_of
from bdfast.neurons import NeuronIndex, NeuronScores, neuron_weight_change
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

DAMAGED = 0.05
"""A loss of accuracy on the clean set, as a fraction, above which a purification warns."""


def purify(
    model: nn.Module,
    clean: Dataset[Any] | DataLoader[Any] | None,
    *,
    method: str | Defense = "uau",
    workdir: str | os.PathLike[str] | None = None,
    progress: bool | Progress = False,
    inplace: bool = False,
    strict: bool = False,
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
        clean: Map-style data set of (image, label), or a DataLoader over one, whose sampler says which samples are used
            and whose batch size, collate function and workers are taken over. A few hundred images; 5 % of the training
            set in the literature. None for a method that can do without ("clp", "otbr"); there is no verdict then.
        method: A name from `bdfast.list_methods("purify")`, or its options object.
        workdir: Folder for checkpoints. A run that was killed goes on from the last finished epoch when it is called
            again with the same arguments and samples, and ends with the same bits.
        progress: Show progress on stderr.
        inplace: Purify `model` itself instead of a copy. If the run fails, its weights are as they were.
        strict: Raise `PurificationError`, which holds the result, where the verdict is neither "removed" nor "nothing
            found", where there is none, or where purification has cost more than 5 points of accuracy.
        seed: Fixes all randomness. The global generators are left where they were.
        batch_size: For a data set; a DataLoader brings its own. Methods that count updates choose theirs.
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

    Warns:
        UserWarning: The model is no better than chance on `clean`, `clean` has one class only or none of some, or
            purification has cost more than 5 points of accuracy. `PurifyResult.warnings` holds the same.

    Raises:
        ValueError: An argument is wrong; the message says which, what was expected, what came and what to do. Nothing
            was changed then.
        TypeError: `clean` is a stream, or a loader that makes its batches by other means than a DataLoader does.
        FloatingPointError: A gradient became NaN or infinite; the message names the parameter.
        PurificationError: See `strict`. With `inplace`, the weights are those of the result.
    """
    defense = method_of(method, options, defenses.METHODS, Defense)
    seed = number(seed)
    device = device_of(model)
    _check_data(clean, defense)
    batches = None if clean is None else Batches(clean, device=device, batch_size=batch_size)
    check_model(model)
    run = Run(seed=seed, forward=normalized(forward), augment=augment, amp=amp, progress=as_progress(progress))
    # Scripts for evaluation are often decorated with no_grad or inference_mode as a whole.
    with torch.inference_mode(False), torch.enable_grad():
        facts = None
        if batches is not None:
            with seeded(seed, device):
                facts = inspect(model, batches, run.forward)
            with seeded(seed, device):
                try_training(model, batches, run.forward)
        if workdir is not None:
            given = {"augment": augment, "forward": forward, "collate_fn": None if batches is None else batches.collate}
            functions = [described(value, name) for name, value in given.items()]
            size = batch_size if batches is None else batches.batch_size
            settings = f"{defense!r} {seed=} {amp=} {channels_last=} batch_size={size} {functions}"
            if batches is not None and facts is not None:
                check_repeatable(batches, seed)
                settings += f" {facts.digest}"
            run.checkpoints = Checkpoints(Path(workdir), fingerprint(model, settings))
        for warning in facts.warnings() if facts else ():
            warnings.warn(warning, stacklevel=2)
        result = _purify(model, defense, batches, run, facts, inplace=inplace, channels_last=channels_last)
    if strict and not result.successful:
        raise PurificationError(result)
    return result


def _purify(
    model: nn.Module,
    defense: Defense,
    batches: Batches | None,
    run: Run,
    facts: CleanSet | None,
    *,
    inplace: bool,
    channels_last: bool,
) -> PurifyResult:
    started = perf_counter()
    device = device_of(model)
    target = model if inplace else copy_of(model)
    channels_last = channels_last and memory_format.channels_last_pays(model, device, run.amp)
    precision = "bfloat16" if run.amp and computes_in_bfloat16(device) else "as the weights"
    run.history.append(Setup(device.type, precision, channels_last, tuple(facts.notes() if facts else ())))
    index = _index(model)
    before = copy.deepcopy(model.state_dict()) if inplace else None
    try:
        lay_out = memory_format.channels_last(target) if channels_last else nullcontext()
        with preserved_modes(target), lay_out, seeded(run.seed, device):
            if batches is None:
                assert isinstance(defense, DataFree)
                outcome = defense.repair(target, run)
            else:
                defense.check(target, batches, run)
                outcome = defense.run(target, batches, run)
    except BaseException:
        if before is not None:
            model.load_state_dict(before)
        raise
    for parameter in target.parameters():
        parameter.grad = None
    damage: list[str] = []
    if batches is not None and facts is not None:
        damage = _damage(facts, facts.accuracy - run.accuracy(target, batches))
    for warning in [*damage, *run.warnings]:
        warnings.warn(warning, stacklevel=3)
    scores, neurons = _scores(outcome, index, target, before or model)
    return PurifyResult(
        model=target,
        method=name_of(defense, defenses.METHODS),
        scores=scores,
        neurons=neurons,
        history=run.history,
        options=plain({**asdict(defense), **outcome.chosen, "seed": run.seed}),
        found=plain(outcome.found),
        seconds=perf_counter() - started,
        updates=run.updates,
        warnings=[*(facts.warnings() if facts else ()), *damage, *run.warnings],
        damaged=bool(damage),
        verdict=outcome.verdict,
        scored_by=defense.scored_by,
        neurons_are=defense.neurons_are,
    )


def _check_data(clean: Dataset[Any] | DataLoader[Any] | None, defense: Defense) -> None:
    if clean is None and not isinstance(defense, DataFree):
        known = ", ".join(name for name, cls in defenses.METHODS.items() if issubclass(cls, DataFree))
        raise ValueError(
            f"clean: expected images, without which {name_of(defense, defenses.METHODS)} cannot work, got None; pass "
            f"some (--data on the command line), or take a method that needs none ({known})."
        )


def _damage(facts: CleanSet, lost: float) -> list[str]:
    """What to say of the accuracy that the purification cost, if it is too much.

    On images that the method trained on, accuracy flatters: a network that has lost it there has lost it everywhere.
    """
    if lost <= DAMAGED or facts.is_chance:
        return []
    return [
        f"model: expected to keep its accuracy on {facts.name} ({facts.accuracy:.1%}), got {facts.accuracy - lost:.1%} "
        "after purification: the network is damaged, and the model that was handed in may be of more use. Lower the "
        "learning rate (lr) or the strength, or take another method."
    ]


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
