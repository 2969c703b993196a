"""Where the demo's images come from: Fashion-MNIST by the first way that works, else scikit-learn's digits."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import socket
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import FashionMNIST

from bdfast.data.images import ImageTensors
from bdfast.files import whole_file

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DOWNLOAD_TIMEOUT_SECONDS = 10.0

# Of the unpacked files, since packagers compress them anew.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class SourceUnavailable(RuntimeError):
    """One way of getting the data did not work; the message says why."""


@dataclass(frozen=True)
class DataSource:
    """Training and test images, and a sentence about where they came from."""

    name: str
    train: ImageTensors
    test: ImageTensors
    message: str


def default_cache() -> Path:
    """`BDFAST_DATA`, else `bdfast` in the user's cache folder."""
    if folder := os.environ.get("BDFAST_DATA"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdfast"


def demo_data(cache: Path | None = None) -> DataSource:
    """Fashion-MNIST from the cache, the Debian package's folder, torchvision's download or the Debian package.

    Where none of these works, the 1,797 digits of scikit-learn; the message of the result says so and why.

    Args:
        cache: Folder that keeps the unpacked files (55 MB); `default_cache()` when left out.

    Raises:
        SourceUnavailable: Not even the digits are there.
    """
    cache = default_cache() if cache is None else cache
    ways: list[tuple[str, Callable[[Path], None]]] = [
        (f"the data cache {cache}", _check_cache),
        (f"the folder {DEBIAN_FOLDER}", lambda raw: _unpack(DEBIAN_FOLDER, raw)),
        ("torchvision's download", _download),
        (f"the Debian package {DEBIAN_PACKAGE}", _debian_package),
    ]
    raw = cache / "FashionMNIST" / "raw"
    reasons = []
    for way, provide in ways:
        try:
            provide(raw)
            train, test = (_images(FashionMNIST(cache, train=train)) for train in (True, False))
        except (SourceUnavailable, OSError, RuntimeError, ValueError) as error:
            reasons.append(f"{way}: {' '.join(str(error).split())}")
        else:
            return DataSource("Fashion-MNIST", train, test, f"Fashion-MNIST from {way}")
    digits = digits_source()
    message = f"{digits.message}, because Fashion-MNIST could not be obtained: " + "; ".join(reasons)
    return replace(digits, message=message)


def digits_source() -> DataSource:
    """scikit-learn's handwritten digits [1797, 1, 8, 8]; the first 1,500 train, the rest test.

    Raises:
        SourceUnavailable: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SourceUnavailable(
            "digits: expected scikit-learn, which carries these images, got none; `pip install scikit-learn`."
        ) from error
    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    names = [str(name) for name in digits.target_names]
    train, test = ImageTensors(images[:1500], labels[:1500], names), ImageTensors(images[1500:], labels[1500:], names)
    return DataSource("digits", train, test, "scikit-learn's digits (8x8)")


def _images(data: FashionMNIST) -> ImageTensors:
    return ImageTensors(data.data.unsqueeze(1), data.targets, data.classes)


def _check_cache(raw: Path) -> None:
    for name, digest in SHA256.items():
        path = raw / name
        if not path.is_file():
            raise SourceUnavailable(f"{name} is missing")
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise SourceUnavailable(f"{name} is damaged")


def _unpack(folder: Path, raw: Path) -> None:
    """The four .gz files of `folder` into `raw`, where torchvision looks for them; each appears whole or not at all."""
    raw.mkdir(parents=True, exist_ok=True)
    for name in SHA256:
        packed = folder / f"{name}.gz"
        if not packed.is_file():
            raise SourceUnavailable(f"{packed.name} is missing")
        try:
            with whole_file(raw / name) as temporary, gzip.open(packed) as source, temporary.open("xb") as unpacked:
                shutil.copyfileobj(source, unpacked)
        except (EOFError, zlib.error) as error:
            raise SourceUnavailable(f"{packed.name} is damaged") from error
    _check_cache(raw)


def _download(raw: Path) -> None:
    with _socket_timeout(DOWNLOAD_TIMEOUT_SECONDS), contextlib.redirect_stdout(io.StringIO()):
        for name in SHA256:  # torchvision takes any existing file for a good one
            (raw / name).unlink(missing_ok=True)
        FashionMNIST(raw.parent.parent, download=True)
    _check_cache(raw)


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Torchvision's download has no timeout of its own, and a silent network must not stop the demo."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _debian_package(raw: Path) -> None:
    """Download the package and take its files out, without root: nothing is installed on the system."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SourceUnavailable("this is no Debian or Ubuntu system")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if not _apt_download(work, []):
            # The system has no package lists, or old ones: fetch some into a folder of our own.
            (work / "lists" / "partial").mkdir(parents=True)
            own_lists = ["-o", f"Dir::State::Lists={work / 'lists'}", "-o", f"Dir::Cache={work / 'cache'}"]
            _apt(work, [*own_lists, "update"])
            if not _apt_download(work, own_lists):
                raise SourceUnavailable("apt-get could not download it")
        package = next(work.glob(f"{DEBIAN_PACKAGE}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(work / "files")], check=True, capture_output=True)
        _unpack(work / "files" / DEBIAN_FOLDER.relative_to("/"), raw)


def _apt_download(work: Path, options: list[str]) -> bool:
    done = _apt(work, [*options, "download", DEBIAN_PACKAGE])
    return done and any(work.glob(f"{DEBIAN_PACKAGE}_*.deb"))


def _apt(work: Path, arguments: list[str]) -> bool:
    try:
        done = subprocess.run(["apt-get", *arguments], cwd=work, capture_output=True, timeout=120, check=False)
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailable(f"apt-get {arguments[-1]} took more than {error.timeout:.0f} s") from error
    return done.returncode == 0
