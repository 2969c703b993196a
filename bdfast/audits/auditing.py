"""`audit`: the public entry point of all audits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from bdfast import audits
from bdfast.attacks import Triggered
from bdfast.audits.base import AuditMethod
from bdfast.audits.case import Case, Images, case_of
from bdfast.audits.findings import Audit
from bdfast.data.batches import Batches
from bdfast.errors import nearest
from bdfast.method_options import name_of
from bdfast.task import Forward, default_forward, device_of, normalized
from bdfast.training import Run
from bdfast.training.clean_set import CleanSet, check_repeatable, inspect
from bdfast.training.descriptions import described, number, plain
from bdfast.training.modes import eval_mode
from bdfast.training.progress import Progress, as_progress
from bdfast.training.resumption import Checkpoints, fingerprint
from bdfast.training.seeds import seeded


def audit(
    before: nn.Module,
    after: nn.Module,
    clean: Images,
    triggered: Triggered | None = None,
    *,
    test: Images | None = None,
    clean_model: nn.Module | None = None,
    target: int | None = None,
    methods: str | AuditMethod | Sequence[str | AuditMethod] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    progress: bool | Progress = False,
    seed: int = 0,
    batch_size: int = 256,
    amp: bool = True,
    forward: Forward = default_forward,
) -> Audit:
    """Ask whether the safety of a purified network is only superficial: whether little brings its backdoor back.

        result = bdfast.audit(model, purified, clean, triggered)
        print(result.verdict, result.o_asr, result.p_asr)

    Like `evaluate`, and unlike `purify`, an audit may see triggers. Without them a surrogate trigger, guessed from
    `before` and `clean`, stands in, and rates are surrogate rates, never ASR. No network given is changed: audits
    work on copies.

    Args:
        before: The network as it was handed in.
        after: The purified one, on the same device.
        clean: The defender's clean images; what audits train on and estimate statistics on. Images in [0, 1] where
            `triggered` is given.
        triggered: Triggered test set; its attack poisons clean images, too.
        test: Clean test images for ACC. If left out, those behind `triggered`; without both a quarter of `clean`,
            which is then set aside.
        clean_model: A network of the same kind that never had a backdoor, as a control: what it learns as fast is no
            sign of a backdoor. The published form of reactivation needs it.
        target: The target label for the surrogate trigger, where it is known.
        methods: Names from `bdfast.audits.METHODS`, or option objects; those for which everything is there, if left
            out.
        workdir: Folder for checkpoints. An audit that was killed goes on from the last finished epoch when it is called
            again with the same arguments, and ends with the same bits.
        progress: Show progress on stderr.
        seed: Fixes all randomness. The global generators are left where they were.
        batch_size: For data sets; a DataLoader brings its own. Audits that train have their own.
        amp: Train in bfloat16 where the device has instructions for it; figures are measured in full precision.
        forward: (model, (images, labels, ...)) -> (logits [B, K], labels [B], ...), for networks of another form.

    Returns:
        The findings, the rates before and after them, and a verdict.

    Warns:
        UserWarning: `before` is no better than chance on `clean`, or `clean` lacks classes.

    Raises:
        ValueError: An argument is wrong, or a method that was asked for lacks something; the message says what to do.
            With `workdir`, samples of `clean`, `test` or `triggered` are others when they are read again.
        TypeError: `triggered` is no `Triggered`, or `clean` is a stream.
        FloatingPointError: A gradient became NaN or infinite in training.
    """
    started = perf_counter()
    chosen = _chosen(methods)
    seed = number(seed)
    device = device_of(before)
    networks = {"before": before, "after": after, "clean_model": clean_model}
    for name, model in networks.items():
        if model is not None and device_of(model) != device:
            raise ValueError(
                f"{name}: expected a network on {device} like `before`, got one on {device_of(model)}; move it there."
            )
    _check_triggered(triggered)
    batches = Batches(clean, device=device, batch_size=batch_size)
    run = Run(seed=seed, forward=normalized(forward), amp=amp, progress=as_progress(progress))
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(seeded(seed, device))
        for model in networks.values():
            if model is not None:
                stack.enter_context(eval_mode(model)).requires_grad_(False)
        facts = {name: inspect(x, batches, run.forward) for name, x in networks.items() if x is not None}
        said = facts["before"].warnings()
        for warning in said:
            warnings.warn(warning, stacklevel=2)
        if workdir is not None:
            check_repeatable(batches, seed)
            settings = f"{chosen!r} {seed=} {amp=} {batch_size=} {target=} {described(forward, 'forward')}"
            run.checkpoints = _checkpoints(Path(workdir), networks, triggered, test, settings, facts["before"], run)
        case = case_of(
            before, after, batches, run, triggered=triggered, test=test, clean_model=clean_model, target=target
        )
        wanted = _possible(chosen, case)
        figures = {name: None if x is None else case.figures(x) for name, x in networks.items()}
        results = {name: method.run(case, run) for name, method in wanted.items()}
    return Audit(
        before=figures["before"],  # type: ignore[arg-type]
        after=figures["after"],  # type: ignore[arg-type]
        clean_model=figures["clean_model"],
        results=results,
        rate_name=case.rate_name,
        trigger=None if case.trigger is None else case.trigger.as_json(),
        notes=case.notes,
        options=plain({**{name: asdict(method) for name, method in wanted.items()}, "seed": seed}),
        seconds=perf_counter() - started,
        warnings=said,
    )


def _chosen(methods: str | AuditMethod | Sequence[str | AuditMethod] | None) -> dict[str, AuditMethod] | None:
    if methods is None:
        return None
    given = [methods] if isinstance(methods, str | AuditMethod) else list(methods)
    known = audits.METHODS
    chosen: dict[str, AuditMethod] = {}
    for method in given:
        if isinstance(method, AuditMethod):
            name = name_of(method, known)
        else:
            name = method
            if name not in known:
                raise ValueError(
                    f"methods: expected names among {', '.join(known)}, got {name!r}; {nearest(name, known)}"
                )
            method = known[name]()
        if name in chosen:
            raise ValueError(f"methods: expected each audit once, got {name} twice; leave one out.")
        chosen[name] = method
    if not chosen:
        raise ValueError("methods: expected at least one audit, got none; leave methods out for all that can run.")
    return chosen


def _possible(chosen: dict[str, AuditMethod] | None, case: Case) -> dict[str, AuditMethod]:
    """The audits to run; those that were not asked for by name are left out where something is missing."""
    candidates = chosen if chosen is not None else {name: cls() for name, cls in audits.METHODS.items()}
    possible = {}
    for name, method in candidates.items():
        missing = method.lacks(case)
        if missing is None:
            possible[name] = method
        elif chosen is None:
            case.notes.append(f"{name} was left out: it needs {missing}.")
        else:
            raise ValueError(
                f"methods: expected {missing} for {name}, got none; give it (see `notes` of an audit without {name}), "
                "or leave this audit out."
            )
    return possible


def _check_triggered(triggered: Triggered | None) -> None:
    if triggered is None:
        return
    if not isinstance(triggered, Triggered):
        raise TypeError(
            f"triggered: expected a bdfast.Triggered, whose trigger audits put into clean images, got "
            f"{type(triggered).__name__}; make one with bdfast.Triggered(data, trigger, target=...)."
        )
    if not len(triggered):
        raise ValueError(
            "triggered: expected images of other classes than the target, got none; pass a test set with all classes."
        )


def _checkpoints(
    folder: Path,
    networks: dict[str, nn.Module | None],
    triggered: Triggered | None,
    test: Images | None,
    settings: str,
    facts: CleanSet,
    run: Run,
) -> Checkpoints:
    """Those of this run: told by the networks, the options, and all images."""
    digests = [facts.digest]
    before = networks["before"]
    assert before is not None
    device = device_of(before)
    for name, data in (("test", test), ("triggered", None if triggered is None else triggered.data)):
        if data is not None:
            batches = Batches(data, device=device, name=name)
            check_repeatable(batches, run.seed)
            digests.append(inspect(before, batches, run.forward).digest)
    attack = "" if triggered is None else described(triggered.attack, "triggered")
    others = [fingerprint(x, name) for name, x in networks.items() if x is not None and name != "before"]
    return Checkpoints(folder, fingerprint(before, f"{settings} {digests} {attack} {others}"))
