"""`bdfast doctor`: versions, which kernels can run here, and how to get those that cannot."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
import torchvision
import tyro
from rich.table import Table

from bdfast import __version__
from bdfast.cli import native_build
from bdfast.cli.native_build import REBUILD, Missing
from bdfast.cli.terminal import Output
from bdfast.ops.backends import BackendStatus, backends
from bdfast.training.precision import computes_in_bfloat16

REBUILD_WITH_CUDA = f"BDFAST_CUDA=1 {REBUILD}"


@dataclass(frozen=True)
class Doctor:
    """Show versions, which backends can run here, what the others lack, and the commands that bring it.

    Attributes:
        show: How to report.
    """

    show: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)


def main(arguments: list[str]) -> None:
    """Run `bdfast doctor`."""
    command = tyro.cli(Doctor, prog="bdfast doctor", args=arguments)
    facts = _facts()
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, str(value))
    status = backends()
    missing = missing_for(status)
    for name, state in status.items():
        table.add_row(f"backend {name}", "ready" if state.available else f"missing: {state.reason}")
    described = {
        name: {**asdict(state), "missing": [step._asdict() for step in missing[name]]} for name, state in status.items()
    }
    command.show.result({**facts, "backends": described}, table)
    if not command.show.json:
        for name, steps in missing.items():
            _print_steps(command.show, name, steps)


def missing_for(status: Mapping[str, BackendStatus]) -> dict[str, list[Missing]]:
    """What each backend lacks here, in the order in which to mend it; nothing for those that are ready."""
    looked_up = {"cpu": _for_cpu, "cuda": _for_cuda, "triton": _for_triton}
    missing = {name: [] if state.available else looked_up[name](status) for name, state in status.items()}
    for name, state in status.items():
        if not state.available and not missing[name]:
            missing[name] = [Missing(state.reason, "bdfast doctor --json")]
    return missing


def _facts() -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "bdfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "bfloat16": "computed by the device" if computes_in_bfloat16(device) else "not used: no instructions for it",
    }


def _print_steps(show: Output, backend: str, steps: list[Missing]) -> None:
    """One line for each thing that is missing and its command, unwrapped, so that it can be copied."""
    if steps:
        show.console.print(f"\nbackend {backend} needs, in this order:", markup=False)
    for number, step in enumerate(steps, 1):
        show.console.print(f"  {number}. {step.what}\n     {step.mend}", markup=False, soft_wrap=True)


def _for_cpu(status: Mapping[str, BackendStatus]) -> list[Missing]:
    """The tools for a build that are not here, and the build."""
    return _build(native_build.for_native(), "native", REBUILD)


def _for_cuda(status: Mapping[str, BackendStatus]) -> list[Missing]:
    """The tools for a build with the CUDA half, unless it is there, and a GPU."""
    native = status["cpu"].available
    if native and torch._C._dispatch_has_kernel_for_dispatch_key("bdfast_cuda::neuron_norms", "CUDA"):
        return _gpu()
    tools = [] if native else native_build.for_native()
    return [*_build([*tools, *native_build.for_cuda(torch.version.cuda)], "CUDA", REBUILD_WITH_CUDA), *_gpu()]


def _for_triton(status: Mapping[str, BackendStatus]) -> list[Missing]:
    """Triton, a GPU, and one that the kernels serve."""
    triton = importlib.util.find_spec("triton")
    return [*([] if triton else [Missing("Triton", "pip install triton")]), *_gpu()]


def _build(tools: list[Missing], part: str, command: str) -> list[Missing]:
    """The tools, and then the build of a part of the kernels that this installation lacks."""
    ninja = native_build.ninja()
    if part == "native" and importlib.util.find_spec("bdfast._C"):
        what = "native kernels that load (those here were built for another torch or another Python)"
    elif tools:
        what = f"the {part} kernels, which this installation was built without"
    else:
        what = f"the {part} kernels (all that their build takes is here; it says why it fails after `bdfast:`)"
        command = command.replace("pip install", "pip install -v")
    return [*tools, *([ninja] if ninja else []), Missing(what, f"{command}  # in the source tree")]


def _gpu() -> list[Missing]:
    """A GPU that torch finds and the kernels serve."""
    if torch.version.cuda is None:
        return [Missing(f"a torch with CUDA (this is {torch.__version__})", "pip install --force-reinstall torch")]
    if not torch.cuda.is_available():
        return [Missing("an NVIDIA GPU that torch finds", "nvidia-smi  # must list it")]
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        what = f"a GPU of compute capability 8.0 or newer (this one has {capability[0]}.{capability[1]})"
        return [Missing(what, "export CUDA_VISIBLE_DEVICES=N  # the number of another one")]
    return []
