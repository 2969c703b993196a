"""`bdfast audit`: is the safety of a purified network only superficial?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import cleandoc
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.table import Table
from torch import nn

from bdfast import attacks, audits
from bdfast.attacks import PreparedAttack, Triggered
from bdfast.attacks.trigger_files import read_trigger, trigger_path
from bdfast.audits.auditing import audit
from bdfast.cli.inputs import DataInput, ModelInput
from bdfast.cli.terminal import Output
from bdfast.errors import nearest
from bdfast.files import finite, writable_folder
from bdfast.models.spec import ModelSpec

Flat = tyro.conf.arg(name="")
COLORS = {"superficial": "bold red", "not removed": "bold red", "no sign": "bold green", "not measured": "bold"}


@dataclass(frozen=True)
class AuditCommand:
    """Say whether the safety of a purified network is only superficial: whether little brings its backdoor back.

    Attributes:
        before: Checkpoint of the network as it was handed in.
        after: Checkpoint of the purified one.
        spec: How to build the networks. A checkpoint that bdfast wrote carries it; then these options are not used.
        clean: The defender's clean images, on which audits train; the training part, of a torchvision set.
        methods: The audits; those for which everything is there, when left out.
        attack: Name of the attack whose trigger is put on the test images. Without one a guess at the trigger stands
            in, and rates are surrogate rates.
        target: Target label: of the attack, 0 when left out; without an attack that of the guess, which is searched
            for when left out.
        trigger: File with the trigger, for an attack that made one with a network; where the demo wrote it, beside
            BEFORE, when left out.
        test: Test images, a folder or the test part of a set; a quarter of the clean images when left out. Needed
            beside an attack.
        clean_model: Checkpoint of a network of the same kind that never had a backdoor, to compare with.
        output: Folder for audit.json; nothing is written when left out.
        workdir: Where checkpoints go, so that an audit that was killed can go on.
        seed: Of all randomness.
        batch_size: Images in one forward pass; audits that train have their own.
        amp: Train in bfloat16 where the device has instructions for it.
        strict: Exit with status 1 where the backdoor is not removed, or comes back.
        show: How to report.
    """

    before: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="BEFORE")]
    after: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="AFTER")]
    clean: Annotated[DataInput, Flat]
    spec: Annotated[ModelSpec, Flat] = field(default_factory=ModelSpec)
    methods: tuple[str, ...] = ()
    attack: str | None = None
    target: int | None = None
    trigger: Path | None = None
    test: str | None = None
    clean_model: Path | None = None
    output: Path | None = None
    workdir: Path | None = None
    seed: int = 0
    batch_size: int = 256
    amp: bool = True
    strict: bool = False
    show: Annotated[Output, Flat] = field(default_factory=Output)


def main(arguments: list[str]) -> None:
    """Run `bdfast audit`."""
    names = list(audits.METHODS)
    # The options of each audit go by its name: --retuning.epochs 5.
    groups = [Annotated[cls, tyro.conf.arg(name=name)] for name, cls in audits.METHODS.items()]
    form: Any = GenericAlias(tuple, (Annotated[AuditCommand, Flat], *groups))
    command, *options = tyro.cli(
        form,
        prog="bdfast audit",
        args=arguments,
        description=cleandoc(AuditCommand.__doc__ or "").split("\n\nAttributes:")[0],
    )
    _audit(command, dict(zip(names, options, strict=True)))


def _audit(command: AuditCommand, options: Mapping[str, audits.AuditMethod]) -> None:
    chosen = _chosen(command.methods, options)
    _check_attack(command)
    if command.output is not None:
        writable_folder(command.output)
    before, spec = ModelInput(command.before, command.spec).load()
    if command.target is not None and not 0 <= command.target < spec.num_classes:
        raise ValueError(
            f"target: expected a class in 0..{spec.num_classes - 1}, got {command.target}; choose a label of the task."
        )
    after = _like(spec, "after", command.after, command.spec)
    clean_model = None
    if command.clean_model is not None:
        clean_model = _like(spec, "clean_model", command.clean_model, command.spec)
    clean = command.clean.load(train=True, spec=spec)
    test = None if command.test is None else command.clean.named(command.test, train=False, spec=spec)
    triggered = None
    if command.attack is not None:
        attack = attacks.METHODS[command.attack](target=command.target or 0)
        if isinstance(attack, PreparedAttack):
            attack = read_trigger(attack, command.trigger or trigger_path(command.before))
        triggered = Triggered(test, attack)  # type: ignore[arg-type]
    result = audit(
        before,
        after,
        clean,
        triggered,
        test=test,
        clean_model=clean_model,
        target=command.target if triggered is None else None,
        methods=chosen,
        workdir=command.workdir,
        progress=command.show.progress(),
        seed=command.seed,
        batch_size=command.batch_size,
        amp=command.amp,
    )
    if command.output is not None:
        result.save(command.output)
    content: dict[str, Any] = finite(result.as_json())
    command.show.result(content, _table(result))
    if command.strict and result.status in ("superficial", "not removed"):
        sys.exit(1)


def _chosen(names: tuple[str, ...], options: Mapping[str, audits.AuditMethod]) -> list[audits.AuditMethod] | None:
    """The audits with their options; None for those that can run."""
    for name in names:
        if name not in options:
            raise ValueError(
                f"methods: expected names among {', '.join(options)}, got {name!r}; {nearest(name, options)}"
            )
    for name, method in options.items():
        # Which audits can run is not known yet, so that options go with names.
        if name not in names and method != type(method)():
            raise ValueError(
                f"{name}: expected options of audits that are named in --methods only, got some for {name}; add it "
                "there, or leave them out."
            )
    return [options[name] for name in names] or None


def _check_attack(command: AuditCommand) -> None:
    """Refuse an attack that cannot be shown, before networks and images are read."""
    name = command.attack
    if name is None:
        if command.trigger is not None:
            raise ValueError(
                f"trigger: expected an attack beside it, got {command.trigger} alone; name it with --attack."
            )
        return
    if name not in attacks.METHODS:
        known = attacks.METHODS
        raise ValueError(f"attack: expected one of {', '.join(known)}, got {name!r}; {nearest(name, known)}")
    if command.test is None:
        raise ValueError(
            "test: expected test images, on which the trigger of --attack is shown, got none; name a folder or a set."
        )


def _like(spec: ModelSpec, name: str, weights: Path, given: ModelSpec) -> nn.Module:
    """Another network for the same images and the same classes in the same order."""
    model, own = ModelInput(weights, given).load()
    for what in ("num_classes", "in_channels", "class_names"):
        wanted, got = getattr(spec, what), getattr(own, what)
        if wanted != got and (what != "class_names" or (wanted and got)):
            raise ValueError(
                f"{name}: expected a network with the {what} of `before`, {wanted}, got {got} in {weights}; take two "
                "checkpoints for the same task."
            )
    return model


def _table(result: audits.Audit) -> Table:
    table = Table(show_header=False)
    color = COLORS.get(result.status, "bold")
    table.add_row("verdict", f"[{color}]{escape(result.verdict)}[/]")
    measured = result.rate_name == "ASR"
    if result.o_rate is not None:
        table.add_row("O-ASR" if measured else result.rate_name, f"{result.o_rate:.1%}")
    for name, rate in result.p_rates.items():
        table.add_row(f"{'P-ASR' if measured else result.rate_name}, {name}", f"{rate:.1%}")
    table.add_row("ACC before, after", f"{result.before.acc:.1%}, {result.after.acc:.1%}")
    for title, lines in (("finding", result.sentences()), ("note", result.notes), ("warning", result.warnings)):
        for line in lines:
            table.add_row(title, escape(line))
    return table
