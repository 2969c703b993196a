"""Timing several ways to do the same, fairly: one run, interleaved, behind a gate, beside the memory's own speed."""

import ctypes
import gc
import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch

OURS = "bdfast"
MEMORY = "memory alone"

Way = Callable[[], object]


@dataclass
class Row:
    """One way in one case; a line of the results file.

    Attributes:
        op: What is done.
        case: On which parameters.
        dtype: Of the parameters.
        way: How.
        p20: Seconds, as are p50 and p80.
        bytes: What the op has to read and write at the least, the same for every way.
        share: bytes / p50, as a share of what the memory did in this run; None where nothing was measured beside.
        times_ours: p50 over that of bdfast.
        extra_bytes: Most memory that one call held beyond what it was given; None where not measured.
        compile_seconds: Of the first call, where it compiles.
    """

    op: str
    case: str
    dtype: str
    way: str
    p20: float
    p50: float
    p80: float
    bytes: int
    share: float | None = None
    times_ours: float | None = None
    extra_bytes: int | None = None
    compile_seconds: float | None = None
    environment: dict[str, object] = field(default_factory=dict)


def environment() -> dict[str, object]:
    describe = ["git", "describe", "--always", "--dirty"]
    return {
        "commit": subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip(),
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "machine": f"{_processor()}, {torch.get_num_threads()} threads",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def interleaved(ways: Mapping[str, Way], rounds: int, prepare: Way | None = None) -> dict[str, list[float]]:
    """Seconds of every way in every round; the order turns, so that no way always follows the same other one."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if prepare is not None:
                    prepare()
                start = time.perf_counter()
                ways[name]()
                times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def rows_of(
    op: str, case: str, dtype: torch.dtype, times: Mapping[str, Sequence[float]], moved: int, memory_moved: int = 0
) -> list[Row]:
    """One row per way.

    Args:
        op: Name of the op.
        case: Name of the parameters.
        dtype: Of the parameters.
        times: As `interleaved` gives them.
        moved: Bytes that the op must move.
        memory_moved: Bytes that the way named MEMORY moves, if there is one.
    """
    ours = statistics.median(times[OURS])
    speed = memory_moved / statistics.median(times[MEMORY]) if MEMORY in times else None
    found = environment()
    rows = []
    for way, seconds in times.items():
        p20, p50, p80 = (float(q) for q in torch.tensor(seconds, dtype=torch.float64).quantile(QUANTILES))
        size = memory_moved if way == MEMORY else moved
        row = Row(op, case, str(dtype).removeprefix("torch."), way, p20, p50, p80, size, environment=found)
        row.share = None if speed is None else size / p50 / speed
        row.times_ours = p50 / ours
        rows.append(row)
    return rows


QUANTILES = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)


def extra_memory(way: Way) -> int | None:
    """The most memory that the process held during one call beyond what it held before; None where Linux is not."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed goes back, or it would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
        before = _peak()
        way()
        return _peak() - before
    except (OSError, AttributeError):
        return None


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def read_two(elements: int, dtype: torch.dtype) -> tuple[Way, int]:
    """Reading two arrays of this size as fast as the memory gives them, and the bytes of it."""
    first, second = torch.ones(elements, dtype=dtype), torch.ones(elements, dtype=dtype)
    if dtype == torch.float32:
        return lambda: torch.dot(first, second), 2 * elements * 4
    # Sums of 16-bit floats are bound by their arithmetic; the same bytes as float32 are not.
    first, second = first.view(torch.float32), second.view(torch.float32)
    return lambda: torch.dot(first, second), 2 * elements * dtype.itemsize


def copy_one(elements: int, dtype: torch.dtype) -> tuple[Way, int]:
    """Copying an array of this size, and the bytes of it."""
    source, target = torch.ones(elements, dtype=dtype), torch.empty(elements, dtype=dtype)
    return lambda: target.copy_(source), 2 * elements * dtype.itemsize


def assert_close(results: Mapping[str, Sequence[torch.Tensor]], tolerance: float = 1e-5) -> None:
    """The gate: every way gives what bdfast gives, up to rounding; tests/ holds bdfast to float64."""
    ours = results[OURS]
    for way, others in results.items():
        for a, b in zip(ours, others, strict=True):
            scale = max(float(a.abs().max()), math.ulp(1.0)) if a.numel() else 1.0
            error = float((a - b).abs().max()) / scale if a.numel() else 0.0
            assert error <= tolerance, f"{way} differs from {OURS} by {error:.2g} of the largest value"
