"""`bdfast matrix run` and `bdfast matrix show`: grids of networks, attacks and defenses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from bdfast.cli.plugins import import_all
from bdfast.errors import nearest
from bdfast.files import whole_file
from bdfast.matrix import read_grid, read_records, run_grid
from bdfast.matrix.heat_map import heat_map
from bdfast.matrix.tables import BY, markdown

ACTIONS = {
    "run": "measure all cells of a grid file that have no record yet",
    "show": "show the records of a run as tables, or as a page",
}


@dataclass(frozen=True)
class MatrixRun:
    """Measure all cells of a grid file that have no record in the output folder yet.

    Attributes:
        grid: The grid, a YAML file.
        output: Folder for records and networks.
        workers: Cells at a time, each in a process of its own.
        threads: Threads of each worker; all cores divided by the workers, when left out.
        retry: Also measure the cells whose record is that of an error.
        quiet: Show no progress.
    """

    grid: tyro.conf.Positional[Path]
    output: Path
    workers: int = 1
    threads: int | None = None
    retry: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class MatrixShow:
    """Show the records of a run as tables of Markdown.

    Attributes:
        folder: The output folder of the run.
        by: What makes the rows, and last the columns, of network, data, attack, clean, defense, seed and split.
        markdown: Write the tables into this file instead.
        html: Write a page with a heat map into this file instead.
        title: Heading of the page.
    """

    folder: tyro.conf.Positional[Path]
    by: str = ",".join(BY)
    markdown: Path | None = None
    html: Path | None = None
    title: str = "Defenses against attacks"


def main(arguments: list[str], imported: Sequence[str] = ()) -> None:
    """Run `bdfast matrix`; `imported` is what `--import` named, for the workers."""
    action, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if action in ("-h", "--help"):
        lines = [f"  {name:<6}{text}" for name, text in ACTIONS.items()]
        usage = ["usage: bdfast matrix run GRID --output DIR [OPTIONS]", "       bdfast matrix show DIR [OPTIONS]", ""]
        sys.stdout.write("\n".join([*usage, *lines, "", "Options: bdfast matrix ACTION --help", ""]))
    elif action == "run":
        _run(tyro.cli(MatrixRun, prog="bdfast matrix run", args=rest), imported)
    elif action == "show":
        _show(tyro.cli(MatrixShow, prog="bdfast matrix show", args=rest))
    else:
        raise ValueError(f"expected one of {', '.join(ACTIONS)}, got {action!r}; {nearest(action, ACTIONS)}")


def _run(command: MatrixRun, imported: Sequence[str]) -> None:
    grid = read_grid(command.grid)
    summary = run_grid(
        grid,
        command.output,
        workers=command.workers,
        threads=command.threads,
        retry=command.retry,
        setup=partial(import_all, tuple(imported)) if imported else None,
        progress=not command.quiet,
    )
    if not command.quiet:
        sys.stderr.write(
            f"{summary.measured} cells measured, {summary.failed} failed, {summary.skipped} had a record. "
            f"`bdfast matrix show {command.output}` shows them.\n"
        )
    if summary.failed:
        failures = [x["error"] for x in read_records(command.output) if "error" in x]
        first = f"{failures[0]['type']}: {failures[0]['message']}".rstrip(". \n")
        raise RuntimeError(
            f"{summary.failed} cells failed, the first with {first}. Their records have the rest; `--retry` measures "
            "them again."
        )


def _show(command: MatrixShow) -> None:
    records, by = read_records(command.folder), tuple(part.strip() for part in command.by.split(","))
    if command.html is not None:
        with whole_file(command.html) as temporary:
            temporary.write_text(heat_map(records, by, title=command.title), encoding="utf-8")
    if command.markdown is not None:
        with whole_file(command.markdown) as temporary:
            temporary.write_text(markdown(records, by), encoding="utf-8")
    if command.html is None and command.markdown is None:
        sys.stdout.write(markdown(records, by))
