"""Progress of long runs: silent unless somebody asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars


class Stage(Protocol):
    """One bar."""

    def __call__(self, done: int, note: str = "") -> None:
        """`done` steps of the stage are finished; `note` is shown beside the bar."""


class Progress(Protocol):
    """What the methods report to."""

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Stage]:
        """Open a bar of `total` steps, or of an unknown number."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Stage]:
        """Accept everything, show nothing."""
        yield lambda done, note="": None


class Bars:
    """Bars with elapsed and remaining time on a terminal; finished ones stay."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Stage]:
        """Show one bar until the stage ends."""
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with RichBars(*columns, console=self._console) as bars:
            task = bars.add_task(title, total=total, note="")

            def advance(done: int, note: str = "") -> None:
                bars.update(task, completed=done, note=note)

            yield advance
            # A stage that may stop early has not failed to finish when it does.
            finished = bars.tasks[0].completed
            bars.update(task, total=finished, completed=finished)


def as_progress(progress: bool | Progress) -> Progress:
    """Bars on stderr for True, nothing for False, else what was given."""
    if isinstance(progress, bool):
        return Bars() if progress else Silent()
    return progress
