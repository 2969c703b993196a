"""Checkpoints of a run in a folder: written whole or not at all, resumed at the last finished epoch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bdfast.files import whole_file

FORMAT = 1


def fingerprint(model: nn.Module, description: str) -> str:
    """SHA-256 of a run: its description (method, options, seed, data size) and the weights that it starts from."""
    digest = hashlib.sha256(description.encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Checkpoints:
    """One file per stage of a run.

    Args:
        folder: Made if missing. Of another run (other weights, options, seed or data size) it is refused.
        run: `fingerprint` of this run.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self._run = folder, run
        self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, stage: str) -> dict[str, Any] | None:
        """What `save` last stored for `stage`; None if nothing.

        Raises:
            ValueError: The file is no checkpoint, or belongs to another run.
        """
        path = self._path(stage)
        if not path.exists():
            return None
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            known = stored["format"] == FORMAT
        except Exception as error:  # an untrusted or damaged file can fail in any way
            raise ValueError(
                f"workdir: expected a checkpoint of bdfast in {path}, got a file that cannot be read ({error}); "
                "delete it or choose another folder."
            ) from error
        if not known or stored["run"] != self._run:
            raise ValueError(
                f"workdir: expected checkpoints of this run in {self.folder}, got those of a run with other weights, "
                "options, seed or data; delete them or choose another folder."
            )
        return dict(stored["state"])

    def save(self, stage: str, state: dict[str, Any]) -> None:
        """Replace what is stored for `stage`; a kill at any moment leaves the old file or the new one."""
        with whole_file(self._path(stage)) as temporary:
            torch.save({"format": FORMAT, "run": self._run, "state": state}, temporary)

    def _path(self, stage: str) -> Path:
        return self.folder / f"{stage.replace(' ', '-')}.pt"
