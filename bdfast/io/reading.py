"""What stands in a file of weights, read without running anything in it.

Two kinds are read: safetensors, and files of torch.save in its present (zip) and its older format. Which one it is, the
first bytes say, not the name. The pickle inside a file of torch.save is looked through (`pickle_check.py`) before
torch's own safe loader gets it, so that a refusal can name what should not be there, and no call in it can ask for more
memory than the file has.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file

from bdfast.io.pickle_check import NUMPY, Refused, check_pickle

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How the older format of torch.save begins: its magic number, pickled."""
LEGACY_PICKLES = 5
"""Magic number, version of the format, facts about the machine, the content, the keys of the storages."""


class Ignored:
    """Stands for a numpy array or number beside the weights. Nothing of it is kept, and numpy is not called."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class IgnoredDtype(Ignored):
    """Stands for a numpy.dtype; one of objects is refused, as such an array holds anything."""

    def __init__(self, code: object = "", *_: object) -> None:
        if (isinstance(code, str) and "O" in code) or (isinstance(code, bytes) and b"O" in code):
            raise Refused("a numpy array of objects is in it")


def ignored(*_: object) -> Ignored:
    """Stands for numpy's functions that rebuild an array or a number."""
    return Ignored()


def no_bytes() -> bytes:
    """What every empty array holds; torch's list lacks it."""
    return b""


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (no_bytes, "builtins.bytes"),
    *(({"numpy.ndarray": Ignored, "numpy.dtype": IgnoredDtype}.get(name, ignored), name) for name in sorted(NUMPY)),
]
"""What torch calls where a file has these names."""


@dataclass(frozen=True)
class FileContent:
    """What stands in a file.

    Attributes:
        value: Whatever was saved; a dict of tensors from safetensors.
        size: Bytes of the file.
        ordered: Whether a dict in it has the order of the network that it was made from. safetensors sorts by name.
    """

    value: Any
    size: int
    ordered: bool


def no_checkpoint(path: Path, reason: object) -> ValueError:
    """The error for a file that holds no weights that can be read."""
    return ValueError(
        f"path: expected a safetensors file or a state dict in {path}, got something else ({reason}); save only the "
        "weights there, with safetensors or torch.save(model.state_dict(), ...)."
    )


def file_content(path: Path) -> FileContent:
    """Read a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is neither kind, is damaged, or holds what is not needed for weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a checkpoint, found no file {path}; check the name.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(0)
            if start[8:9] == b"{":  # after the length of the header, 8 bytes
                # A copy: tensors of safetensors are views of the file, and change or crash when it is written to.
                return FileContent({name: x.clone() for name, x in load_file(path).items()}, size, ordered=False)
            if start.startswith(ZIP):
                _check_zip(file, size)
            elif start.startswith(PICKLE):
                _check_legacy(file, start)
            else:
                raise Refused("it begins like neither of them")
            file.seek(0)
            with torch.serialization.safe_globals(STAND_INS):
                return FileContent(torch.load(file, map_location="cpu", weights_only=True), size, ordered=True)
    except Exception as error:  # an untrusted or damaged file can fail in any way
        raise no_checkpoint(path, _reason(error)) from (None if isinstance(error, Refused) else error)


def _check_zip(file: BinaryIO, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        # torch looks names up without regard to case: of two alike, this check and torch could see different ones.
        if len({name.lower() for name in names}) < len(names):
            raise Refused("several entries of its archive have one name")
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > size:
            raise Refused(f"its archive unpacks to {unpacked:,} bytes, more than the {size:,} of the file")
        folder = names[0].partition("/")[0] if names else ""
        if f"{folder}/constants.pkl" in names:
            raise Refused("it is a TorchScript archive, which holds code")
        if f"{folder}/data.pkl" not in names:
            raise Refused("it is a zip archive that torch.save did not write")
        check_pickle(archive.read(f"{folder}/data.pkl"))


def _check_legacy(file: BinaryIO, start: bytes) -> None:
    if not start.startswith(LEGACY):
        check_pickle(file)  # the name of a class in it says more than the missing magic number
        raise Refused("it is a pickle that torch.save did not write")
    for _ in range(LEGACY_PICKLES):
        check_pickle(file)


def _reason(error: Exception) -> str:
    """One plain line. torch's own text advises to load a refused file with its safety off; that is not handed on."""
    text = str(error)
    if "weights_only" in text:
        return f"torch's safe loader refuses it, {type(error).__name__}"
    line = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().split("\n")[0]
    line = "".join(x if x.isprintable() else "?" for x in line[:200])
    return line if isinstance(error, Refused) else f"{type(error).__name__}: {line}"
