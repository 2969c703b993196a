"""The named sources of images: for `backdoored`, and for `--data` on the command line."""

from __future__ import annotations

import re
from collections.abc import Callable

from bdfast.data.data_source import DataSource
from bdfast.data.digits import digits_source, mnist_digits_source
from bdfast.data.fashion_mnist import demo_data
from bdfast.data.fashion_on_photos import fashion_on_photos_source
from bdfast.errors import nearest

SOURCES: dict[str, Callable[[], DataSource]] = {
    "fashion-mnist": demo_data,
    "digits": digits_source,
    "mnist-digits": mnist_digits_source,
    "fashion-on-photos": fashion_on_photos_source,
}


def load_source(name: str) -> DataSource:
    """The images of the source that is called `name`.

    Raises:
        ValueError: There is no such source.
        SourceUnavailable: Its images cannot be had.
        TypeError: The function that was registered returned something else.
    """
    if name not in SOURCES:
        raise ValueError(f"data: expected one of {', '.join(SOURCES)}, got {name!r}; {nearest(name, SOURCES)}")
    source = SOURCES[name]()
    if not isinstance(source, DataSource):
        raise TypeError(
            f"data: expected a DataSource from the function of {name!r}, got {type(source).__name__}; return one."
        )
    return source


def register_data(name: str, function: Callable[[], DataSource]) -> None:
    """Make a data set of your own known under `name`: to `backdoored` and to `--data` on the command line.

        bdfast.register_data("mine", lambda: bdfast.DataSource("mine", train, test, "my camera"))

    The command line learns of it with `bdfast --import my_file.py purify tsbd weights.pt --data mine`.

    Args:
        name: Lower-case letters, digits, "_" and "-".
        function: Called without arguments at each use; returns a `DataSource`.

    Raises:
        ValueError: The name has other characters or is taken by another function.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ValueError(f"name: expected lower-case letters, digits, '_' and '-', got {name!r}; choose such a name.")
    taken = SOURCES.get(name)
    # A cell of a notebook that is run again defines the same function anew.
    if taken is not None and _written_as(taken) != _written_as(function):
        raise ValueError(f"name: expected one that is free, got {name!r}, which is taken; choose another.")
    SOURCES[name] = function


def _written_as(function: Callable[[], DataSource]) -> tuple[str, str]:
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", repr(function))
