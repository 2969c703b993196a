"""Fashion-MNIST by the first way that works; for the demo, else scikit-learn's digits."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torchvision.datasets import FashionMNIST

from bdfast.data.data_source import DataSource, SourceUnavailable, default_cache
from bdfast.data.debian import unpacked_package
from bdfast.data.digits import digits_source
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


def demo_data(cache: Path | None = None) -> DataSource:
    """Fashion-MNIST, or the 1,797 digits of scikit-learn where it cannot be had; the message then says so and why.

    Args:
        cache: As for `fashion_mnist_source`.

    Raises:
        SourceUnavailable: Not even the digits are there.
    """
    try:
        return fashion_mnist_source(cache)
    except SourceUnavailable as error:
        digits = digits_source()
        return replace(digits, message=f"{digits.message}, because {error}")


def fashion_mnist_source(cache: Path | None = None) -> DataSource:
    """Fashion-MNIST from the cache, the Debian package's folder, torchvision's download or the Debian package.

    70,000 garments of Zalando [1, 28, 28] in 10 classes, 60,000 to train; Xiao et al., arXiv:1708.07747. MIT licence.

    Args:
        cache: Folder that keeps the unpacked files (55 MB); `default_cache()` when left out.

    Raises:
        SourceUnavailable: None of these works; the message has the reasons.
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
            message = f"Fashion-MNIST from {way}"
            return DataSource("Fashion-MNIST", train, test, message, epochs=4, mean=(0.286,), std=(0.353,))
    raise SourceUnavailable("Fashion-MNIST could not be obtained: " + "; ".join(reasons))


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
    with unpacked_package(DEBIAN_PACKAGE) as files:
        _unpack(files / DEBIAN_FOLDER.relative_to("/"), raw)
