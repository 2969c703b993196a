"""Runs the cases one by one, each in a process of its own, and shows all of it at the end: `python -m bench [-k WHAT]`.

A process of its own, because what earlier cases leave in the allocator makes the ways that allocate faster.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import show
from bench.lists import DEVICE

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROWS = RESULTS / ("gpu.jsonl" if DEVICE == "cuda" else "cpu.jsonl")
# Not as in the tests: pytest-benchmark warns where pytest-xdist is set up, and a warning of torch is no failed timing.
PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "--dist=no",
    "-Wdefault",
    "--benchmark-enable",
    "--benchmark-disable-gc",
)
# Copies of more than 4 MB past the caches, which glibc by itself does only for copies as large as the last cache. It
# is what the memory can do, which is what the others are measured against.
ENVIRONMENT = {**os.environ, "GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x400000"}


def collect(expression: str) -> list[str]:
    """The names of the cases that pytest selects."""
    command = [*PYTEST, str(HERE), "--collect-only", "-k", expression]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        sys.exit(listed.stdout + listed.stderr)
    return [line for line in listed.stdout.splitlines() if "::" in line]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("-k", default="", metavar="WHAT", help="only the cases that pytest -k selects")
    cases = collect(parser.parse_args().k)
    console = Console(width=150)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failed = {}
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        rows_file = Path(folder) / "rows.jsonl"
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.split("::")[-1])
            ran = subprocess.run(
                [*PYTEST, case, f"--rows={rows_file}"],
                cwd=HERE.parent,
                env=ENVIRONMENT,
                capture_output=True,
                text=True,
            )
            if ran.returncode:
                failed[case] = ran.stdout + ran.stderr
            progress.advance(task)
        rows = show.read(rows_file) if rows_file.exists() else []
    if rows:
        show.record(rows, ROWS)
        console.print(show.table(rows))
        for name, points in show.growing(rows).items():
            each = ", ".join(f"{millions} M {seconds / millions * 1e6:.0f} us" for millions, seconds in points)
            console.print(f"{name}: time ~ size^{show.exponent(points):.3f}; per million parameters: {each}")
        for figure in show.figures(rows, RESULTS / "gpu" if DEVICE == "cuda" else RESULTS):
            console.print(f"drawn: {figure}")
        console.print(f"appended to {ROWS}")
    for case, output in failed.items():
        console.print(f"[bold red]failed:[/] {case}")
        console.print(output[-3000:], markup=False)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
