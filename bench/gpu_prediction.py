"""Writes docs/gpu.md: what the compiler made of the CUDA kernels, what that should cost on an H100, and what a card has
measured. `python -m bench.gpu_prediction` needs nvcc, and runs the ways once on the CPU to count what they do."""

import functools
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import lists, show, test_ops, test_steps
from bench.compare import OURS
from tests.static.cubins import ARCHITECTURES, Kernel, all_kernels

BANDWIDTH = 3.0e12  # bytes per second, of an H100
LAUNCH = 3e-6  # seconds
NETWORKS = ("ResNet-50", "ViT-B/16", "ViT-L/16")
MEASURED = Path(__file__).parent / "results" / "gpu.jsonl"  # by `make gpu-check`
TIMES = Path(__file__).parent / "results" / "gpu-times.txt"  # by `python -m bench.gpu_times`
PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"

# One launch of a `torch._foreach` op takes at most this many tensors, and so many pieces of so many elements.
FOREACH_TENSORS, FOREACH_PIECES, FOREACH_PIECE = 110, 320, 65536

# Launches of each op for parameters without a row of more than 65,536; tests/emulator/test_launches.py counts them.
LAUNCHES = {
    "neuron_norms": 1,
    "kth_largest_change": 4,
    "zero_changed_": 1,
    "scale_neurons_": 1,
    "perturb_": 3,
    "sharp_step_": 1,
    "TSBD step": 4,
    "FT-SAM step": 4,
    "PAM step": 1 + 2,
}
# The pool is read once for each digit.
PASSES = {"kth_largest_change": 3}

# The kernels that read the elements, and the file that they stand in.
MAIN_KERNELS = {
    "neuron_norms": ("neuron_norms", "norms_of_rows<NormOf<(Norm)0>, true"),
    "kth_largest_change": ("kth_largest_change", "count_digit"),
    "zero_changed_": ("zero_changed", "zero_rows"),
    "scale_neurons_": ("scale_neurons", "scale_rows"),
    "perturb_, norm": ("perturb", "sum_squares<(PerturbMode)1"),
    "perturb_, step": ("perturb", "step<(PerturbMode)1"),
    "sharp_step_": ("sharp_step", "step<Lists<true, true, false>"),
}
DTYPES = {"float32": "Float32", "bfloat16": "BFloat16"}


@dataclass
class Cost:
    """Launches, and bytes that are read and written."""

    launches: int
    bytes: float

    def seconds(self) -> float:
        return self.launches * LAUNCH + self.bytes / BANDWIDTH


class Counting(TorchDispatchMode):
    """Counts what torch's kernels would launch, read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost(0, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = func._schema.name.removeprefix("aten::")
        if is_view or name.startswith(("empty", "_local_scalar", "is_", "_to_copy")):
            return result
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if "copy_" in name:  # what is written is not read
            read = read[len(read) // 2 :]
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name.startswith("_foreach") and name.endswith("_"):
            written = list(args[0])
        self.cost.bytes += sum(x.nbytes for x in (*read, *written))
        self.cost.launches += self.launches_of(name, args)
        return result

    def launches_of(self, name: str, args: tuple) -> int:
        if not name.startswith("_foreach"):
            return 1
        pieces = sum(math.ceil(x.numel() / FOREACH_PIECE) for x in args[0])
        return max(math.ceil(len(args[0]) / FOREACH_TENSORS), math.ceil(pieces / FOREACH_PIECES))


@torch.no_grad()
def counted(way: Callable[[], object]) -> Cost:
    with Counting() as counting:
        way()
    return counting.cost


def ops_on(network: str) -> Iterable[tuple[str, Cost, Cost, Cost]]:
    """Op, and what ours, the loop and foreach cost."""
    elements = lists.elements(network)
    for op in test_ops.OPS:
        case = op(network)
        ours = Cost(LAUNCHES[op.__name__], case.bytes_each * PASSES.get(op.__name__, 1) * elements)
        yield op.__name__, ours, counted(case.ways["loop"]), counted(case.ways["foreach"])
    for step, (bytes_each, published, foreach, *_) in test_steps.STEPS.items():
        state = test_steps.fresh(network)
        ours = Cost(LAUNCHES[step], bytes_each * elements)
        yield step, ours, *(counted(functools.partial(way, **state)) for way in (published, foreach))


def find(kernels: list[Kernel], source: str, start: str, dtype: str, architecture: str) -> Kernel:
    (found,) = (
        k
        for k in kernels
        if (k.source, k.architecture) == (source, architecture)
        and k.name.startswith(start)
        and k.name.endswith(f"{DTYPES[dtype]}>")
        and not k.name.endswith(f"B{DTYPES[dtype]}>")
    )
    return found


def kernel_table(kernels: list[Kernel]) -> Iterable[str]:
    what = "registers, occupancy, wide loads / stores"
    yield "| kernel | dtype | " + " | ".join(f"{name}: {what}" for name in ARCHITECTURES) + " |"
    yield "|---|---|" + "---|" * len(ARCHITECTURES)
    for name, (source, start) in MAIN_KERNELS.items():
        for dtype in DTYPES:
            cells = []
            for architecture in ARCHITECTURES:
                k = find(kernels, source, start, dtype, architecture)
                wide = f"{k.count('LDG', '.128')} / {k.count('STG', '.128')}"
                cells.append(f"{k.registers}, {k.occupancy:.0%}, {wide}")
            yield f"| `{name}` | {dtype} | " + " | ".join(cells) + " |"


def measured(network: str) -> dict[str, str]:
    """The last times of every op on a GPU, in microseconds: bdfast, loop, foreach; nothing where none was measured."""
    rows = show.read(MEASURED) if MEASURED.exists() else []
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.case == network and row.environment.get("backend") == "cuda":
            found.setdefault(row.op, {})[row.way] = row.p50
    ways = (OURS, "loop", "foreach")
    return {op: ", ".join(f"{of[way] * 1e6:.0f}" if way in of else "-" for way in ways) for op, of in found.items()}


def time_table(network: str) -> Iterable[str]:
    millions = lists.elements(network) / 1e6
    yield f"### {network}: {millions:.1f} M parameters in {len(lists.shapes(network))} tensors, float32"
    yield ""
    others = "launches, bytes, us"
    both = "measured, us: bdfast, loop, foreach"
    yield f"| | launches | bytes per parameter | predicted, us | {both} | loop: {others} | foreach: {others} |"
    yield "|---|---|---|---|---|---|---|"
    times = measured(network)
    for op, ours, *rest in track(ops_on(network), description=network, total=len(LAUNCHES)):
        cells = [f"{c.launches}, {c.bytes / millions / 1e6:.0f}, {c.seconds() * 1e6:.0f}" for c in rest]
        each = ours.bytes / millions / 1e6
        cells = [f"{ours.launches}", f"{each:.1f}", f"{ours.seconds() * 1e6:.0f}", times.get(op, "not yet"), *cells]
        yield f"| {op} | {' | '.join(cells)} |"
    yield ""


INTRODUCTION = """# CUDA and Triton kernels on a GPU

Written by `python -m bench.gpu_prediction`. **One card has run these kernels**: an NVIDIA H200 (driver 580.159, torch
2.11.0+cu130, triton 3.6.0) on 2026-11-26. On it both backends pass all tests of the ops, a step replays from a CUDA
graph with the same bits, and `bdfast demo` takes 32 s. Times on any other card are **predicted**.

What is known without a card: the CUDA kernels compile for sm_80, sm_90 and sm_100 to what stands below; their very
source runs on the CPU in an emulator (`tests/emulator`), where they pass the tests of the ops in float64, give the same
bits in three orders of threads, and are clean under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
Twelve planted bugs are caught there. The Triton kernels pass in Triton's interpreter and compile ahead of time for the
same architectures. `make gpu-check` builds, tests and times all of it on a machine with a card.

## What the H200 measured

Device time is between two events around a call that was enqueued while the GPU slept; host time is until the call
returns. A training step that never waits pays the larger one. `foreach` is the best of `torch._foreach`; it waits for
the norm in `perturb_`, so its host time there holds the sleep of 10 ms.

```
{times}
```

What it showed:

* The CUDA kernels move 78 to 100 % of what a copy moves on networks of 25 M parameters or more. Only
  `kth_largest_change` cannot: it reads everything three times.
* The host was the limit: it planned every call anew. Now plans are looked up: `perturb_` on ViT-L/16, which needs
  1.5 ms on the device, took 2.2 ms on the host before and 0.4 ms after (`bench/results/gpu-times-before.txt`). On
  ResNet-50 the host still takes longer than the device.
* The Triton kernels are as fast on the device, but for `kth_largest_change` (19 times slower), and take 1 to 8 ms on
  the host. They are the fallback where the CUDA kernels are not built.

## What the compiler made of the CUDA kernels

Occupancy is the share of an SM's warps that fit in by registers, at 256 threads a block. No kernel spills or keeps
anything in local memory; `tests/static` holds that, at most 64 registers, and 128-bit accesses.
"""

FORMULA = f"""
## Predicted times

time = launches x {LAUNCH * 1e6:.0f} us + bytes / {BANDWIDTH / 1e12:.1f} TB/s, the same formula for every way. Bytes are
what is read and written: for the loop (as in published code) and for `torch._foreach` counted from the arguments and
results of every torch op, for bdfast the least that the op has to move. `torch._foreach` launches once per
{FOREACH_TENSORS} tensors or {FOREACH_PIECES} pieces of {FOREACH_PIECE:,} elements. Launches of bdfast are counted in
the emulator; a cleared counter or a copied norm is not one. Measured times are medians of single calls on the H200 with
the wait for their end (`python -m bench`), so they hold the host's part too; only they are measured.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kernels = all_kernels(Path(folder))
    lines = [INTRODUCTION.format(times=TIMES.read_text().rstrip()), *kernel_table(kernels), FORMULA]
    for network in NETWORKS:
        lines += time_table(network)
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
