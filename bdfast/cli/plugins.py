"""`bdfast --import`: code of the user's own, which may register methods."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def import_all(names: Sequence[str]) -> None:
    """Import each of these, as `import_code` does."""
    for name in names:
        import_code(name)


def import_code(name: str) -> None:
    """Import a module by name, or run a file as a module of its name.

    Raises:
        ValueError: There is no such file or module.
    """
    if not name.endswith(".py"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--import: expected a file or a module, found no {error.name}; check the name, or give a file with "
                "its path and .py."
            ) from error
        return
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"--import: expected a file, found no {path}; check the name.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
