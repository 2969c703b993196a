"""Files of a Debian package, without root: nothing is installed on the system."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bdfast.data.data_source import SourceUnavailable

APT_TIMEOUT_SECONDS = 120.0


@contextmanager
def unpacked_package(package: str) -> Iterator[Path]:
    """Download `package` and unpack it; the folder holds its files as `/` would, and is gone after the block.

    Raises:
        SourceUnavailable: There is no apt-get or dpkg-deb, or the package cannot be had or unpacked.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SourceUnavailable("this is no Debian or Ubuntu system")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if not _apt_download(work, [], package):
            # The system has no package lists, or old ones: fetch some into a folder of our own.
            (work / "lists" / "partial").mkdir(parents=True)
            own_lists = ["-o", f"Dir::State::Lists={work / 'lists'}", "-o", f"Dir::Cache={work / 'cache'}"]
            _apt(work, [*own_lists, "update"])
            if not _apt_download(work, own_lists, package):
                raise SourceUnavailable("apt-get could not download it")
        archive = next(work.glob(f"{package}_*.deb"))
        command = ["dpkg-deb", "-x", str(archive), str(work / "files")]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise SourceUnavailable(f"dpkg-deb could not unpack {archive.name}")
        yield work / "files"


def _apt_download(work: Path, options: list[str], package: str) -> bool:
    done = _apt(work, [*options, "download", package])
    return done and any(work.glob(f"{package}_*.deb"))


def _apt(work: Path, arguments: list[str]) -> bool:
    command = ["apt-get", *arguments]
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, timeout=APT_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailable(f"apt-get {arguments[-1]} took more than {error.timeout:.0f} s") from error
    return done.returncode == 0
