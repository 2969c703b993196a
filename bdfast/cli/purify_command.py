"""`bdfast purify METHOD`: remove a backdoor from a network on disk."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.table import Table

from bdfast import report
from bdfast.cli.inputs import CleanInput, ModelInput, drawn
from bdfast.cli.method_arguments import Flat, parsed
from bdfast.cli.terminal import Output
from bdfast.data.augmentation import Augmentation
from bdfast.defenses import METHODS, Defense
from bdfast.defenses.purification import purify
from bdfast.files import writable_folder


@dataclass(frozen=True)
class Purify:
    """Remove a backdoor from a network with clean images only, or, with some methods, with none.

    Attributes:
        model: The network.
        clean: Clean images of the kind that the network was trained on; the training part, of a torchvision set.
        images: Use this many of them, drawn by the seed; all when left out.
        output: Folder where the purified model, the scores and the report go.
        workdir: Where checkpoints go, so that a run that was killed can go on.
        seed: Of all randomness.
        batch_size: Images in one step.
        augment: Shift images at random by up to a 28th of their size.
        flip: Mirror every second image as well.
        amp: Compute in bfloat16 where the device has instructions for it.
        strict: Exit with status 1 where the backdoor is not removed, or the network is damaged.
        show: How to report.
    """

    model: Annotated[ModelInput, Flat]
    clean: Annotated[CleanInput, Flat]
    images: int | None = None
    output: Path = Path("purified")
    workdir: Path | None = None
    seed: int = 0
    batch_size: int = 256
    augment: bool = True
    flip: bool = False
    amp: bool = True
    strict: bool = False
    show: Annotated[Output, Flat] = field(default_factory=Output)


def main(arguments: list[str]) -> None:
    """Run `bdfast purify METHOD`."""
    found = parsed("purify", "WEIGHTS --data DATA", Purify, METHODS, arguments)
    if found is not None:
        _purify(*found)


def _purify(command: Purify, method: Defense) -> None:
    writable_folder(command.output)
    model, spec = command.model.load()
    clean = command.clean.load(spec=spec)
    if clean is not None:
        clean = drawn(clean, command.images, command.seed)
    result = purify(
        model,
        clean,
        method=method,
        workdir=command.workdir,
        progress=command.show.progress(),
        seed=command.seed,
        batch_size=command.batch_size,
        augment=Augmentation(flip=command.flip) if command.augment else None,
        amp=command.amp,
    )
    result.save(command.output, description=spec.to_json())
    images = "none" if clean is None else f"{len(clean)} of {command.clean.data}"  # type: ignore[arg-type]
    facts = {"Model": str(command.model.weights), "Clean images": images}
    page = report.write(command.output, title="Purification", before=None, after=None, result=result, facts=facts)
    summary = {
        "method": result.method,
        **({} if result.verdict is None else {"verdict": str(result.verdict)}),
        "neurons_reset": result.neurons_reset,
        "neurons": 0 if result.scores is None else len(result.scores),
        **({"target": result.found["target"]} if "target" in result.found else {}),
        "seconds": round(result.seconds, 1),
        "model": str(command.output / "model.safetensors"),
        "report": str(page),
        "options": result.options,
    }
    table = Table(show_header=False)
    for key, value in summary.items():
        if key != "options":
            label = f"neurons {result.neurons_are}" if key == "neurons_reset" else key.replace("_", " ")
            table.add_row(label, str(value))
    command.show.result(summary, table)
    if command.strict and not result.successful:
        sys.exit(1)
