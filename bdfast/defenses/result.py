"""What a purification returns."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bdfast.files import whole_file
from bdfast.io.checkpoints import save_weights
from bdfast.scores import NeuronScores


@dataclass(frozen=True, eq=False)
class PurifyResult:
    """A purified model and how it came about.

    Attributes:
        model: The purified model, on its device, in the modes that it was handed in with.
        method: Name of the defense.
        scores: What the defense measured of every neuron.
        neurons: [R] bool, the neurons that it reset, in the order of `scores`.
        history: A first row with "stage" "setup", then one per epoch or probe: "stage", "epoch", "accuracy", "loss",
            "seconds", and for probes "option" and "value", "kept" (within the accuracy budget) and "chosen".
        options: Every option of the method with the value that was used, chosen ones included.
        found: What else the method found out, by name, such as the target label of a trigger that it inverted.
        seconds: Wall-clock time of the purification.
    """

    model: nn.Module
    method: str
    scores: NeuronScores
    neurons: torch.Tensor
    history: list[dict[str, Any]]
    options: dict[str, Any]
    found: dict[str, Any]
    seconds: float

    def save(self, folder: str | os.PathLike[str], *, description: str | None = None) -> None:
        """Write `model.safetensors`, `scores.csv` and `result.json` into `folder`, each whole or not at all.

        `description` (`ModelSpec.to_json()`) goes into the checkpoint.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, target / "model.safetensors", description=description)
        self.scores.to_csv(target / "scores.csv")
        write_json(
            target / "result.json",
            {
                "method": self.method,
                "options": self.options,
                "found": self.found,
                "seconds": self.seconds,
                "neurons_reset": int(self.neurons.sum()),
                "neurons": len(self.scores),
                "history": self.history,
            },
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file appears whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
