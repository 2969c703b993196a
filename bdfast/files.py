"""Atomic file writes."""

from __future__ import annotations

import json
import math
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` to write to; what was written takes the place of `path` when the block ends without error.

    A kill or a full disk at any moment leaves the old file, or the new one.
    """
    target = Path(path)
    # In the same folder, as a rename is atomic only within one file system.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # some file systems report a full disk only here
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a file that appears whole or not at all; NaN and infinity, which JSON has not, become null."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same for JSON, which has neither NaN nor infinity: they become None."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def writable_folder(folder: Path) -> None:
    """Make a folder, parents included, and see that files can be written there, before hours of work end in it.

    Raises:
        OSError: They cannot; the message names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        got = f"{str(folder)!r} ({error.strerror})"
        message = f"output: expected a folder that can be written to, got {got}; choose another"
        raise type(error)(error.errno, message) from error
