"""What the commands show: progress and a table for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from bdfast.evaluation import Metrics
from bdfast.training.progress import Bars, Progress, Silent


@dataclass(frozen=True)
class Output:
    """How a command reports.

    Attributes:
        quiet: Show neither progress nor tables.
        json: Print the result as JSON on standard output, and nothing else there.
    """

    quiet: bool = False
    json: bool = False

    @property
    def console(self) -> Console:
        """Where people read: standard error beside JSON, so that standard output stays parseable."""
        return Console(stderr=self.json, quiet=self.quiet, highlight=False)

    def progress(self) -> Progress:
        """Bars, or nothing under `quiet`."""
        return Silent() if self.quiet else Bars(self.console)

    def result(self, content: dict[str, Any], table: Table) -> None:
        """The end of a command: the table, or its content as JSON."""
        if self.json:
            json.dump(content, sys.stdout, indent=2)
            sys.stdout.write("\n")
        else:
            self.console.print(table)


def metrics_table(rows: dict[str, Metrics]) -> Table:
    """One line per model, one column per metric, in percent."""
    table = Table()
    table.add_column("")
    names = ["acc", "asr", "ra", "der"]
    shown = [name for name in names if any(getattr(metrics, name) is not None for metrics in rows.values())]
    for name in shown:
        table.add_column(name.upper(), justify="right")
    for title, metrics in rows.items():
        values = [getattr(metrics, name) for name in shown]
        table.add_row(title, *("" if value is None else f"{value:.1%}" for value in values))
    return table
