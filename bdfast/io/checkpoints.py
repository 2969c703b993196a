"""Weights on disk: safetensors out; safetensors and plain state dicts in. Nothing in a file is ever executed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bdfast.files import whole_file

DESCRIPTION = "bdfast.model"
"""Key in the metadata of a safetensors file under which the description of the network stands."""


def save_weights(model: nn.Module, path: str | os.PathLike[str], *, description: str | None = None) -> None:
    """Write the state dict as safetensors; the file appears whole or not at all.

    Tied parameters are stored under each of their names. `description` (`ModelSpec.to_json()`) travels with them, so
    that `bdfast evaluate FILE` can build the network again.
    """
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    with whole_file(path) as temporary:
        save_file(state, temporary, metadata={DESCRIPTION: description} if description else None)


def read_description(path: str | os.PathLike[str]) -> str | None:
    """The description that `save_weights` stored with the weights; None where there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(DESCRIPTION)
    except (SafetensorError, OSError):
        return None


def load_weights(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a state dict from safetensors, or from a file of torch.save, with its safe loader.

    Of a dict that holds the weights under "model" or "state_dict" (BackdoorBench's results, common training scripts)
    these are taken; a "module." that DataParallel put in front of the names is dropped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, or not one that can be read without executing what is in it.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"path: expected a checkpoint, found no file {source}; check the name.")
    try:
        if source.suffix == ".safetensors":
            content: Any = load_file(source)
        else:
            content = torch.load(source, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise _no_checkpoint(source, error) from error
    except Exception as error:  # unpickling a hostile or damaged file can fail in any way
        raise _no_checkpoint(source, error) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise _no_checkpoint(source, f"it holds a {type(content).__name__}")
    strange = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise _no_checkpoint(source, f"{strange[0]!r} is a {type(content[strange[0]]).__name__}, not a tensor")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content)


def load_into(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load the weights at `path` into `model`, all of them or none.

    Raises:
        ValueError: Names or shapes differ; the message counts them and shows the first.
    """
    state, expected = load_weights(path), model.state_dict()
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    wrong = [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    if missing or unexpected or wrong:
        name = min([*wrong, *missing, *unexpected])
        raise ValueError(
            f"path: expected the weights of this architecture in {path}, got {len(missing)} names missing, "
            f"{len(unexpected)} unknown and {len(wrong)} of another shape (the first is {name!r}); choose the "
            "architecture, width, stem and number of classes that the file was made with."
        )
    model.load_state_dict(state)
    return model


def _no_checkpoint(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"path: expected a safetensors file or a state dict in {path}, got something else ({reason}); save the weights "
        "with safetensors or torch.save(model.state_dict(), ...)."
    )
