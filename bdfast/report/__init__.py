"""Reports: one self-contained HTML file, and its figures as PNG files in the same folder."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bdfast.report import page
from bdfast.report.examples import Examples

if TYPE_CHECKING:
    from bdfast.audits import Audit
    from bdfast.audits.landscape import Landscape
    from bdfast.defenses import PurifyResult
    from bdfast.evaluation import Metrics

__all__ = ["Examples", "write"]


def write(
    folder: str | os.PathLike[str],
    *,
    title: str,
    before: Metrics | None,
    after: Metrics | None,
    result: PurifyResult,
    examples: Examples | None = None,
    landscape: Landscape | None = None,
    audit: Audit | None = None,
    facts: Mapping[str, str],
) -> Path:
    """Writes `report.html` and its figures into `folder`, replacing an earlier report as a whole.

    The page needs nothing but itself: no network, no script, no file beside it. The figures are written again
    as `metrics.png`, `weight_change.png`, `accuracy.png`, `sharpness.png`, `path.png`,
    `audit.png` and `examples.png`. A figure without data is left out, and removed where an earlier report has left it.

    Args:
        folder: Where to write; made if missing.
        title: Heading of the page.
        before: Metrics of the original model, or None if not measured; single metrics may be None too.
        after: Metrics of the purified model, likewise.
        result: What `bdfast.purify` returned.
        examples: Images to show, or None.
        landscape: What `bdfast.audits.landscape.survey` found, or None.
        audit: What `bdfast.audit` returned, or None.
        facts: What a reader should know about the run, name to value: data, model, attack, seeds, versions.

    Returns:
        The path of `report.html`.

    Raises:
        OSError: `folder` cannot be written to, or the disk is full. An earlier report there is unchanged.
    """
    folder = Path(folder)
    files = page.render(
        title=title,
        before=before,
        after=after,
        result=result,
        examples=examples,
        landscape=landscape,
        audit=audit,
        facts=facts,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder, files)
    except OSError as error:
        reason = error.strerror or str(error)
        message = (
            f"write: folder: expected a folder with room that can be written to, got {str(folder)!r} ({reason}); free "
            "some space or choose another folder. A report that was there is unchanged"
        )
        if error.errno is None:
            raise type(error)(message) from error
        # Picks the subclass by the number, so `except PermissionError` works as for the original.
        raise OSError(error.errno, message, error.filename) from error
    return folder / page.HTML


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    blocked = next((path for name in files if (path := folder / name).is_dir()), None)
    if blocked is not None:
        raise IsADirectoryError(errno.EISDIR, "a folder is in the way", str(blocked))
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as temporary:
        for name, content in files.items():
            with open(Path(temporary, name), "wb") as file:
                file.write(content)
                file.flush()
                # Some file systems report a full disk only here, which is still before anything is replaced.
                os.fsync(file.fileno())
        for name in files:
            os.replace(Path(temporary, name), folder / name)
    for name in page.FIGURES:
        if name not in files:
            (folder / name).unlink(missing_ok=True)
