"""`bdfast evaluate`: ACC of a network, and ASR and RA under an attack."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from bdfast.attacks import METHODS, PreparedAttack, Triggered
from bdfast.attacks.trigger_files import read_trigger, trigger_path
from bdfast.cli.inputs import DataInput, ModelInput
from bdfast.cli.terminal import Output, metrics_table
from bdfast.errors import nearest
from bdfast.evaluation import evaluate

Flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Evaluate:
    """Measure a network on test images.

    Attributes:
        model: The network.
        test: Test images.
        attack: Name of an attack whose trigger is put on the test images, for ASR and RA.
        target: Target label of the attack.
        trigger: File with the trigger, for an attack that made one with a network; where the demo wrote it, beside the
            weights, when left out.
        recalibrate_on: Folder or set of clean images on which BatchNorm statistics are estimated anew first; the
            training part, of a torchvision set.
        batch_size: Images in one forward pass.
        show: How to report.
    """

    model: Annotated[ModelInput, Flat]
    test: Annotated[DataInput, Flat]
    attack: str | None = None
    target: int = 0
    trigger: Path | None = None
    recalibrate_on: str | None = None
    batch_size: int = 500
    show: Annotated[Output, Flat] = field(default_factory=Output)


def main(arguments: list[str]) -> None:
    """Run `bdfast evaluate`."""
    command = tyro.cli(Evaluate, prog="bdfast evaluate", args=arguments)
    if command.attack is not None and command.attack not in METHODS:
        raise ValueError(
            f"attack: expected one of {', '.join(METHODS)}, got {command.attack!r}; {nearest(command.attack, METHODS)}"
        )
    model, spec = command.model.load()
    test = command.test.load(train=False, spec=spec)
    triggered = None
    if command.attack is not None:
        attack = METHODS[command.attack](target=command.target)
        if isinstance(attack, PreparedAttack):
            attack = read_trigger(attack, command.trigger or trigger_path(command.model.weights))
        triggered = Triggered(test, attack)
    recalibration = None
    if command.recalibrate_on is not None:
        clean = DataInput(data=command.recalibrate_on, root=command.test.root, size=command.test.size)
        recalibration = clean.load(train=True, spec=spec)
    metrics = evaluate(model, test, triggered, recalibrate_on=recalibration, batch_size=command.batch_size)
    command.show.result(metrics.as_dict(), metrics_table({str(command.model.weights): metrics}))
