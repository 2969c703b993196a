"""`bdfast doctor`: versions, and which kernels can run here."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
import torchvision
import tyro
from rich.table import Table

from bdfast import __version__
from bdfast.cli.terminal import Output
from bdfast.ops.backends import backends
from bdfast.training.precision import computes_in_bfloat16


@dataclass(frozen=True)
class Doctor:
    """Show versions and which backends can run here, and why the others cannot.

    Attributes:
        show: How to report.
    """

    show: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)


def main(arguments: list[str]) -> None:
    """Run `bdfast doctor`."""
    command = tyro.cli(Doctor, prog="bdfast doctor", args=arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {
        "bdfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "bfloat16": "computed by the device" if computes_in_bfloat16(device) else "not used: no instructions for it",
    }
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    status = backends()
    for name, state in status.items():
        table.add_row(f"backend {name}", "ready" if state.available else f"missing: {state.reason}")
    content = {**facts, "backends": {name: asdict(state) for name, state in status.items()}}
    command.show.result(content, table)
