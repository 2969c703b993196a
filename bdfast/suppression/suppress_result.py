"""What training on suspicious data returns."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bdfast.files import write_json
from bdfast.io import save_weights
from bdfast.training import Row
from bdfast.training.history import as_json


@dataclass(frozen=True, eq=False)
class SuppressResult:
    """A network trained on data that may be poisoned, and how it came about.

    Attributes:
        model: The trained network, on its device, in the train or eval mode of the one that was handed in.
        method: Name of the method.
        suspected: [M] int64, the indices of the samples that the method takes for poisoned, ascending. Methods always
            name some, poisoned or not.
        precision: Share of `suspected` that is poisoned in truth; None where `truth` was not given.
        history: What it did, in order: a `Setup`, then an `Epoch` each (`bdfast.training`).
        options: Every option of the method with the value that was used, chosen ones included.
        found: What else the method found out, by name.
        seconds: Wall-clock time.
        updates: Steps of optimizers that it took, those of other networks included.
        warnings: What speaks against trusting the result.
    """

    model: nn.Module
    method: str
    suspected: torch.Tensor
    precision: float | None
    history: list[Row]
    options: dict[str, Any]
    found: dict[str, Any]
    seconds: float
    updates: int
    warnings: list[str] = field(default_factory=list)

    def save(self, folder: str | os.PathLike[str], *, description: str | None = None) -> None:
        """Write `model.safetensors` and `result.json` into `folder`, each whole or not at all.

        `description` (`ModelSpec.to_json()`) goes into the checkpoint.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, target / "model.safetensors", description=description)
        write_json(
            target / "result.json",
            {
                "method": self.method,
                "options": self.options,
                "found": self.found,
                "precision": self.precision,
                "seconds": self.seconds,
                "updates": self.updates,
                "warnings": self.warnings,
                "suspected": self.suspected.tolist(),
                "history": as_json(self.history),
            },
        )
