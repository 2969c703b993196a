"""Records: one JSON file a cell, which appears whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bdfast._version import __version__
from bdfast.files import write_json
from bdfast.matrix.cells import Cell

FORMAT = 1
FRAMES = 4
"""Of a traceback that go into a record."""


def record_of(cell: Cell, found: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked, and on what machine; and what was found."""
    return {
        "format": FORMAT,
        "id": cell.id,
        "split": cell.split,
        "network": {**cell.network.described(), "epochs": cell.asked_epochs},
        "data": cell.data,
        "attack": cell.attack.described(),
        "clean": {"name": cell.clean.name, **cell.clean.content()},
        "defense": cell.defense.described(),
        "seed": cell.seed,
        "versions": {"bdfast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": processor(), "threads": torch.get_num_threads()},
        **found,
    }


def error_found(error: BaseException, during: str) -> dict[str, Any]:
    """What a record says of an error.

    Args:
        error: What was raised.
        during: "training" or "purifying".
    """
    lines = traceback.format_exception(type(error), error, error.__traceback__, limit=-FRAMES)
    return {
        "error": {
            "type": type(error).__name__,
            "message": str(error),
            "during": during,
            "traceback": "".join(lines),
        }
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a cell in place of an earlier one."""
    write_json(folder / f"{record['id']}.json", record)


def read_records(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records in the output folder of a run, or in its sub-folder `records`, by the name of their files.

    Raises:
        FileNotFoundError: There are none.
        ValueError: A file is no record of this version.
    """
    folder = Path(folder)
    inner = folder / "records"
    paths = sorted((inner if inner.is_dir() else folder).glob("*.json"))
    if not paths:
        raise FileNotFoundError(
            f"records: expected the output folder of bdfast matrix run, found no records in {folder}."
        )
    return [_read(path) for path in paths]


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["format"] == FORMAT and isinstance(record["id"], str)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"records: expected a record in {path}, got something else ({error}); remove it.") from error
    if not known:
        raise ValueError(
            f"records: expected format {FORMAT} in {path}, got {record['format']!r}; use the bdfast that wrote it."
        )
    return record


def processor() -> str:
    """The name of the GPU, where there is one, else of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory_mib() -> float:
    """The most memory that this process has held since it started, in MiB.

    That of a process that has done several cells is that of the largest so far.
    """
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10
