"""`compare`: runs ways against each other; what it measured is printed and drawn at the end, or left to `bench`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import compare as comparing
from bench import show
from bench.compare import MEMORY, OURS, Row, Way

# A compilation that was kept from an earlier run would cost nothing here.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

ROUNDS = 11
ROUNDS_OF_LARGE = 5  # from this many elements on
LARGE = 100_000_000

_rows: list[Row] = []


class Compare:
    """One comparison; see `__call__`."""

    def __init__(self, benchmark, compiling: bool) -> None:
        self.benchmark = benchmark
        self.compiling = compiling
        self.timing = not benchmark.disabled
        self.used = False

    def __call__(
        self,
        op: str,
        case: str,
        ways: Mapping[str, Way],
        *,
        moved: int,
        dtype: torch.dtype = torch.float32,
        compiled: Mapping[str, Way] | None = None,
        memory: str | None = None,
        elements: int = 0,
        rounds: int | None = None,
        gate: Callable[[Mapping[str, Way]], None],
        prepare: Way | None = None,
    ) -> dict[str, Row]:
        """Check that all ways agree, then time them in turns.

        Args:
            op: What is done.
            case: On which parameters.
            ways: Name -> the way; one is called `OURS`.
            moved: Bytes that the op has to move at the least.
            dtype: Of the parameters.
            compiled: More ways, whose first call compiles; that call is timed on its own.
            memory: What to time beside: READING or COPYING arrays of so many `elements`.
            elements: In all parameters.
            rounds: How often each way runs.
            gate: Called with all ways before anything is timed; raises where one is wrong.
            prepare: Called before every run, outside the time.

        Returns:
            The rows by way; empty where nothing is timed (without --benchmark-enable).
        """
        compile_seconds = {}
        compiled = compiled if self.compiling else None
        for name, way in (compiled or {}).items():
            if self.timing:
                start = time.perf_counter()
                way()
                compile_seconds[name] = time.perf_counter() - start
        everything = {**ways, **(compiled or {})} if self.timing else dict(ways)
        # First, so that what a way allocates once and keeps is counted.
        extra = {name: comparing.extra_memory(way) for name, way in everything.items()} if self.timing else {}
        gate(everything)
        if not self.timing:
            if not self.used:
                self.benchmark(lambda: None)
                self.used = True
            return {}
        rounds = rounds or (ROUNDS_OF_LARGE if elements >= LARGE else ROUNDS)
        times = comparing.interleaved(everything, rounds, prepare)
        memory_moved = 0
        if memory is not None:
            # By itself: torch's threads go on spinning after a call, and would take turns with those that copy.
            way, memory_moved = comparing.memory_alone(memory, elements, dtype)
            times |= comparing.interleaved({MEMORY: way}, rounds)
        rows = comparing.rows_of(op, case, dtype, times, moved, memory_moved)
        for row in rows:
            row.extra_bytes = extra.get(row.way)
            row.compile_seconds = compile_seconds.get(row.way)
        _rows.extend(rows)
        if not self.used:  # its own table takes one entry of a test
            self.benchmark.pedantic(everything[OURS], setup=prepare, rounds=1)
            self.used = True
        return {row.way: row for row in rows}


@pytest.fixture
def compare(benchmark, request) -> Compare:
    return Compare(benchmark, not request.config.getoption("--no-compile"))


def pytest_addoption(parser) -> None:
    parser.addoption("--rows", type=Path, help="append what was measured to this file instead of printing it")
    parser.addoption("--no-compile", action="store_true", help="leave torch.compile out: half a minute a case")


def pytest_terminal_summary(config) -> None:
    if not _rows:
        return
    if path := config.getoption("--rows"):
        show.record(_rows, path)
    else:
        Console(width=150).print(show.table(_rows))
