import errno
import os
import resource

import pytest

from bdfast import report
from bdfast.report import page


def write(folder):
    return report.write(folder, title="", before=None, after=None, result=None, facts={})


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A folder with an earlier report, and a new one of which writing is all that is left to do."""
    files = {"metrics.png": b"new " * 50_000, "report.html": b"new " * 100_000}
    monkeypatch.setattr(page, "render", lambda **_: files)
    for name in ("metrics.png", "accuracy.png", "report.html", "notes.txt"):
        (tmp_path / name).write_bytes(b"old")
    return tmp_path


def contents(folder):
    return {path.name: path.read_bytes()[:4] for path in folder.iterdir()}


OLD = {"metrics.png": b"old", "accuracy.png": b"old", "report.html": b"old", "notes.txt": b"old"}


def test_new_report_replaces_the_old_one_and_no_other_file(earlier):
    write(earlier)
    assert contents(earlier) == {"metrics.png": b"new ", "report.html": b"new ", "notes.txt": b"old"}
    umask = os.umask(0)
    os.umask(umask)
    assert (earlier / "report.html").stat().st_mode & 0o777 == 0o666 & ~umask


def test_full_disk_leaves_the_old_report(earlier, monkeypatch):
    def second_is_full(path, mode):
        return open("/dev/full" if path.name == "report.html" else path, mode)

    monkeypatch.setattr(report, "open", second_is_full, raising=False)
    with pytest.raises(OSError, match=r"write: folder: expected .*, got .*; free some space.*unchanged") as caught:
        write(earlier)
    assert caught.value.errno == errno.ENOSPC
    assert contents(earlier) == OLD


def test_write_that_breaks_off_leaves_the_old_report(earlier):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(earlier)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(earlier) == OLD


def test_error_without_a_number_keeps_its_class(earlier, monkeypatch):
    def gone(path, mode):
        raise TimeoutError("server does not answer")

    monkeypatch.setattr(report, "open", gone, raising=False)
    with pytest.raises(TimeoutError, match=r"got '.*' \(server does not answer\); free some space"):
        write(earlier)
    assert contents(earlier) == OLD


def test_things_in_the_way_are_named(earlier):
    with pytest.raises(FileExistsError, match=r"folder: expected .*, got '.*notes.txt'"):
        write(earlier / "notes.txt")
    with pytest.raises(NotADirectoryError, match="choose another folder"):
        write(earlier / "notes.txt" / "below")
    (earlier / "report.html").unlink()
    (earlier / "report.html").mkdir()
    with pytest.raises(IsADirectoryError, match="a folder is in the way"):
        write(earlier)
    assert (earlier / "metrics.png").read_bytes() == b"old"
