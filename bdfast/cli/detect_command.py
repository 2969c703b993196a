"""`bdfast detect METHOD`: does a network on disk look as if it had a backdoor?"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bdfast.cli.inputs import DataInput, ModelInput, drawn
from bdfast.cli.method_arguments import Flat, parsed
from bdfast.cli.sarif import as_sarif
from bdfast.detectors import METHODS, Calibration, Detection, Detector
from bdfast.detectors.detection import detect
from bdfast.files import finite, writable_folder
from bdfast.training.progress import Bars, Silent

SHOWN = 5
"""Classes in the table: the suspects, and the first of the others."""


@dataclass(frozen=True)
class Detect:
    """Say whether a network looks as if it had a backdoor, from clean images only.

    Exit status: 0 not suspicious, 1 suspicious, 2 something could not be read or is wrong.

    Attributes:
        model: The network.
        clean: Clean images of the kind that the network was trained on; the training part, of a torchvision set.
        images: Use this many of them, drawn by the seed; all when left out.
        threshold: The score above which a network is suspicious.
        calibration: File with the scores of clean networks (`bdfast.detectors.calibrate`, `Calibration.save`).
        false_alarms: The share of clean networks that may be accused, for a threshold from a calibration.
        output: Folder for detection.json and the guessed trigger; nothing is written when left out.
        format: What goes to standard output.
        fail_on: "never" to exit with 0 for a suspicious network, too.
        seed: Of all randomness.
        batch_size: Images in one step.
        amp: Compute in bfloat16 where the device has instructions for it.
        quiet: Show no progress.
    """

    model: Annotated[ModelInput, Flat]
    clean: Annotated[DataInput, Flat]
    images: int | None = None
    threshold: float | None = None
    calibration: Path | None = None
    false_alarms: float = 0.05
    output: Path | None = None
    format: Literal["table", "json", "sarif"] = "table"
    fail_on: Literal["suspicious", "never"] = "suspicious"
    seed: int = 0
    batch_size: int = 256
    amp: bool = True
    quiet: bool = False


def main(arguments: list[str]) -> None:
    """Run `bdfast detect METHOD`."""
    found = parsed("detect", "WEIGHTS --data DATA", Detect, METHODS, arguments)
    if found is not None:
        _detect(*found)


def _detect(command: Detect, method: Detector) -> None:
    if command.output is not None:
        writable_folder(command.output)
    calibration = None if command.calibration is None else Calibration.load(command.calibration)
    model, spec = command.model.load()
    clean = drawn(command.clean.load(train=True, spec=spec), command.images, command.seed)
    detection = detect(
        model,
        clean,
        method=method,
        threshold=command.threshold,
        calibration=calibration,
        false_alarms=command.false_alarms,
        progress=Silent() if command.quiet else Bars(Console(stderr=True, highlight=False)),
        seed=command.seed,
        batch_size=command.batch_size,
        amp=command.amp,
    )
    if command.output is not None:
        detection.save(command.output)
    if command.format == "table":
        Console(highlight=False).print(_table(detection))
    else:
        weights = command.model.weights
        content = as_sarif(detection, weights) if command.format == "sarif" else detection.as_json()
        sys.stdout.write(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")
    if detection.suspicious and command.fail_on == "suspicious":
        sys.exit(1)


def _table(detection: Detection) -> Table:
    table = Table(show_header=False)
    verdict = "[bold red]suspicious[/]" if detection.suspicious else "[bold green]not suspicious[/]"
    table.add_row("verdict", verdict)
    table.add_row("score", f"{detection.score:.3g}: {detection.scored_by}")
    table.add_row("threshold", escape(f"{detection.threshold:.3g}: {detection.threshold_from}"))
    known = detection.false_alarms
    table.add_row("false alarms", "not measured for these options" if known is None else str(known))
    labels = ", ".join("all-to-all" if target < 0 else str(target) for target in detection.targets)
    table.add_row("suspected target label" if detection.suspicious else "likeliest target label", labels or "none")
    for name, values in detection.evidence.items():
        known_ones = [(label, value) for label, value in enumerate(values) if not math.isnan(value)]
        first = [pair for pair in known_ones if pair[0] in detection.targets]
        others = [pair for pair in known_ones if pair[0] not in detection.targets]
        shown = [*first, *others][: max(SHOWN, len(first))]
        more = f", {len(known_ones) - len(shown)} more" if len(known_ones) > len(shown) else ""
        table.add_row(name, ", ".join(f"{label}: {value:.3g}" for label, value in shown) + more)
    for note in detection.notes:
        table.add_row("note", escape(note))
    return table
