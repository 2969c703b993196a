"""A run: every cell of a grid that has no record yet, each network first."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdfast.files import writable_folder
from bdfast.matrix.cells import Cell
from bdfast.matrix.feasibility import check_grid
from bdfast.matrix.grid import Grid
from bdfast.matrix.images_by_name import DataFacts
from bdfast.matrix.networks import NetworkStore, Training, training_of
from bdfast.matrix.records import error_found, read_records, record_of, write_record
from bdfast.matrix.workers import Crew, Setup, Work, do
from bdfast.training.progress import Progress, Stage, as_progress

LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{32}")
"""Names of files that a killed process was writing."""


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Attributes:
        measured: Cells that were measured now.
        failed: Cells that ended in an error now.
        skipped: Cells that had a record.
    """

    measured: int
    failed: int
    skipped: int


def run_grid(
    grid: Grid,
    output: str | os.PathLike[str],
    *,
    workers: int = 1,
    threads: int | None = None,
    retry: bool = False,
    setup: Setup | None = None,
    progress: bool | Progress = False,
) -> RunSummary:
    """Measure all cells of a grid that have no record in `output` yet.

    Records go into `output/records`, networks into `output/networks`, checkpoints into `output/work` meanwhile. A run
    that was killed goes on when it is started again, and leaves the records of an undisturbed one, times aside.

    Args:
        grid: From `read_grid`.
        output: Folder; made if missing. Grids may share one.
        workers: Cells at a time, each in a process of its own; 1 is this process.
        threads: Of each worker; those that torch has here, divided by `workers`, when left out. Another number of
            threads may give other bits.
        retry: Also measure the cells whose record is that of an error.
        setup: Called first in every other process, where it may import code that registers methods; picklable.
        progress: Show progress on stderr.

    Raises:
        GridError: A cell cannot be had; nothing was trained.
        ValueError: `workers` or `threads` is no number above zero.
        OSError: `output` cannot be written to, or another run is at work there.
    """
    for name, count in (("workers", workers), ("threads", threads)):
        if count is not None and count < 1:
            raise ValueError(f"{name}: expected 1 or more, got {count}; leave it out for the default.")
    facts = check_grid(grid)
    crew = Crew(Path(output), facts, workers, threads, setup)
    for part in ("records", "networks"):
        writable_folder(crew.output / part)
    with _alone(crew.output):
        _sweep(crew.output)
        done = _finished(crew.output, retry=retry)
        cells = [cell for cell in grid.cells if cell.id not in done]
        schedule = _Schedule(cells, facts, NetworkStore(crew.output / "networks"), crew.output / "records")
        with as_progress(progress).stage("cells", len(cells)) as shown:
            _run(schedule, crew, shown)
        with suppress(OSError):  # another grid may have checkpoints there
            (crew.output / "work").rmdir()
    return RunSummary(schedule.measured, schedule.failed, len(grid.cells) - len(cells))


def _run(schedule: _Schedule, crew: Crew, shown: Stage) -> None:
    """Until everything is done. Where a worker dies, so does the pool, and another takes its place."""
    suspects: deque[Work] = deque()
    while schedule.ready or suspects:
        running: dict[Future[Any], Work] = {}
        try:
            with crew.at_work() as pool:
                # Of several that ran when a worker died, each has to show alone that it was not the reason.
                while suspects:
                    running = {pool.submit(do, suspects[0]): suspects[0]}
                    _settle(running, schedule, shown)
                    suspects.popleft()
                _all(schedule, pool, running, crew.workers, shown)
        except BrokenProcessPool as error:
            if suspects:
                schedule.settled(suspects.popleft(), died=error)
                schedule.show(shown)
            else:
                suspects.extend(running.values())


def _all(schedule: _Schedule, pool: Executor, running: dict[Future[Any], Work], workers: int, shown: Stage) -> None:
    while schedule.ready or running:
        while schedule.ready and len(running) < workers:
            work = schedule.ready.popleft()
            try:
                running[pool.submit(do, work)] = work
            except BrokenProcessPool:
                schedule.ready.appendleft(work)
                raise
        _settle(running, schedule, shown)


def _settle(running: dict[Future[Any], Work], schedule: _Schedule, shown: Stage) -> None:
    """Wait for one piece of work at least."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        result = future.result()
        schedule.settled(running.pop(future), result)
        schedule.show(shown)


class _Schedule:
    """What can be done now, and what waits for a network."""

    def __init__(self, cells: list[Cell], facts: dict[str, DataFacts], store: NetworkStore, records: Path) -> None:
        self.ready: deque[Work] = deque()
        self.measured = self.failed = 0
        self._records = records
        self._waiting: dict[str, list[Work]] = {}
        self._store = store
        for cell in cells:
            self._add(cell, training_of(cell, facts[cell.data]))

    def _add(self, work: Work, needed: Training | None) -> None:
        if needed is None or self._store.has(needed.digest):
            self.ready.append(work)
        elif needed.digest in self._waiting:
            self._waiting[needed.digest].append(work)
        else:
            self._waiting[needed.digest] = [work]
            self._add(needed, needed.before)

    def settled(self, work: Work, result: Any = None, died: Exception | None = None) -> None:
        """Note how a piece of work ended, and what can be done after it."""
        if isinstance(work, Cell):
            if died is not None:
                self._write(work, error_found(died, "purifying"))
            elif result:
                self.measured += 1
            else:
                self.failed += 1
            return
        waiting = self._waiting.pop(work.digest)
        error = result if died is None else error_found(died, "training")
        if error is None:
            self.ready.extendleft(reversed(waiting))  # while the network is at hand
            return
        for other in waiting:
            if isinstance(other, Cell):
                self._write(other, error)
            else:
                self.settled(other, error)

    def show(self, shown: Stage) -> None:
        """Report how many cells are done."""
        shown(self.measured + self.failed, f"{self.failed} failed" if self.failed else "")

    def _write(self, cell: Cell, error: dict[str, Any]) -> None:
        write_record(self._records, record_of(cell, error))
        self.failed += 1


def _finished(output: Path, *, retry: bool) -> set[str]:
    """The cells that have a record."""
    try:
        records = read_records(output)
    except FileNotFoundError:
        return set()
    return {record["id"] for record in records if not (retry and "error" in record)}


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keeps a second run out of the folder. The lock goes with the process, however that ends."""
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, f"output: expected a folder for this run alone, got {output}, where another one is at work"
            ) from error
        yield


def _sweep(output: Path) -> None:
    """Remove what killed processes have left half written."""
    for part in ("records", "networks"):
        for path in (output / part).iterdir():
            if LEFT_OVER.fullmatch(path.name):
                path.unlink()
    for path in (output / "work").glob("*"):
        if (output / "records" / f"{path.name}.json").exists():
            shutil.rmtree(path)
