"""Triggers of prepared attacks on disk, beside the weights of the network that knows them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bdfast.attacks.prepared import PreparedAttack
from bdfast.files import whole_file

ATTACK = "bdfast.attack"
"""Key in the metadata of the file under which the name of the attack's class stands."""

Prepared = TypeVar("Prepared", bound=PreparedAttack)


def trigger_path(weights: str | os.PathLike[str]) -> Path:
    """Where the trigger belongs that goes with these weights: `net.trigger.safetensors` for `net.safetensors`."""
    path = Path(weights)
    return path.with_name(f"{path.stem}.trigger.safetensors")


def save_trigger(attack: PreparedAttack, path: str | os.PathLike[str]) -> None:
    """Write the state of an attack as safetensors; the file appears whole or not at all.

    Raises:
        ValueError: The attack has no trigger yet.
    """
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in attack.known_state().items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={ATTACK: type(attack).__name__})


def read_trigger(attack: Prepared, path: str | os.PathLike[str]) -> Prepared:
    """The attack with the state that `save_trigger` wrote.

    Raises:
        ValueError: There is no such file, or it holds something else.
    """
    wanted = type(attack).__name__
    try:
        with safe_open(path, framework="pt") as file:
            name = (file.metadata() or {}).get(ATTACK)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"trigger: expected the trigger of {wanted} in {path}, got no such file ({error}); it was written beside "
            "the weights, so get both, or remove the weights to train anew."
        ) from error
    if name != wanted:
        raise ValueError(f"trigger: expected the trigger of {wanted} in {path}, got that of {name}; take its own file.")
    return attack.with_state(state)
