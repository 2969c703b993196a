"""Timing several ways to do the same, fairly: one run, interleaved, behind a gate, beside the memory's own speed."""

import ctypes
import functools
import gc
import itertools
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch

from bdfast.ops.backends import ENVIRONMENT_VARIABLE, ORDER, backends
from bench.lists import DEVICE

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
        "machine": machine(),
        "backend": backend(),
    }


def backend() -> str:
    """What computes the way called OURS."""
    usable = (name for name in ORDER[DEVICE] if backends()[name].available)
    return os.environ.get(ENVIRONMENT_VARIABLE) or next(usable)


def machine() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def wait() -> None:
    """Until everything that was started has happened."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


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
                wait()
                start = time.perf_counter()
                ways[name]()
                wait()
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
    """The most memory that was held during one call beyond what was held before; None where Linux is not."""
    gc.collect()
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        return torch.cuda.max_memory_allocated() - before
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


READING = "reading two arrays"
COPYING = "copying one array"


# More than the caches hold: repeated, reading or copying goes through so much before it comes to the same bytes again.
BEYOND_CACHES = 1 << 30


def memory_alone(kind: str, elements: int, dtype: torch.dtype) -> tuple[Way, int]:
    """Reading two arrays or copying one of this size as fast as the memory gives them, and the bytes of it."""
    size = elements * dtype.itemsize
    # As float32 and bytes they do for any dtype; sums of 16-bit floats would be bound by their arithmetic.
    pairs = [
        [torch.ones(-(-size // 4), dtype=torch.float32, device=DEVICE) for _ in range(2)]
        for _ in range(max(1, BEYOND_CACHES // (2 * size)))
    ]
    turns = itertools.cycle(pairs)
    if kind == READING:
        return lambda: torch.dot(*next(turns)), 2 * size
    if DEVICE == "cuda":
        return lambda: torch.Tensor.copy_(*next(turns)), 2 * size
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)
    bounds = [size * i // threads for i in range(threads + 1)]

    def copy_part(to: int, source: int, part: int) -> None:
        begin = bounds[part]
        ctypes.memmove(to + begin, source + begin, bounds[part + 1] - begin)

    def copy() -> None:
        to, source = (x.data_ptr() for x in next(turns))
        list(pool.map(functools.partial(copy_part, to, source), range(threads)))

    return copy, 2 * size


def same_results(ways: Mapping[str, Way], written: Sequence[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """What every way makes of the same start, in the tensors that it writes."""
    start = [x.clone() for x in written]
    results = {}
    for name, way in ways.items():
        torch._foreach_copy_(written, start)
        way()
        results[name] = [x.clone() for x in written]
    return results


def assert_close(results: Mapping[str, Sequence[torch.Tensor]], tolerance: float = 1e-5) -> None:
    """The gate: every way gives what bdfast gives, up to rounding; tests/ holds bdfast to float64."""
    ours = results[OURS]
    for way, others in results.items():
        for a, b in zip(ours, others, strict=True):
            scale = max(float(a.abs().max()), math.ulp(1.0)) if a.numel() else 1.0
            error = float((a - b).abs().max()) / scale if a.numel() else 0.0
            assert error <= tolerance, f"{way} differs from {OURS} by {error:.2g} of the largest value"
