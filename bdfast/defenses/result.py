"""What a purification returns."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bdfast.defenses.base import Defense
from bdfast.defenses.verdict import Verdict
from bdfast.files import write_json
from bdfast.io import save_weights
from bdfast.neurons import NeuronScores
from bdfast.training import Row
from bdfast.training.history import as_json


@dataclass(frozen=True, eq=False)
class PurifyResult:
    """A purified model and how it came about.

    Attributes:
        model: The purified model, on its device, in the train or eval mode of the original.
        method: Name of the defense.
        scores: What the defense measured of every neuron, or how far each one has moved; None for a network without
            neurons that bdfast knows (`bdfast.register_neurons`).
        neurons: [R] bool, the neurons that it reset, in the order of `scores`; None without scores.
        history: What it did, in order: a `Setup`, then an `Epoch` or a `Probe` each (`bdfast.training`).
        options: Every option of the method with the value that was used, chosen ones included.
        found: What else the method found out, by name, such as the target label of a trigger that it inverted.
        seconds: Wall-clock time of the purification.
        updates: Steps of optimizers that it took, those of probes and of trigger inversion included.
        warnings: What speaks against trusting the result, such as a model at chance on the clean set.
        verdict: Whether the backdoor is gone, as far as clean images tell; None where the method cannot tell.
        scored_by: What `scores` are.
        neurons_are: What happened to `neurons`: "reinitialised", "pruned", ...
        damaged: Whether purification has cost more than 5 points of accuracy on the clean set.
    """

    model: nn.Module
    method: str
    scores: NeuronScores | None
    neurons: torch.Tensor | None
    history: list[Row]
    options: dict[str, Any]
    found: dict[str, Any]
    seconds: float
    updates: int
    warnings: list[str] = field(default_factory=list)
    verdict: Verdict | None = None
    damaged: bool = False
    scored_by: str = Defense.scored_by
    neurons_are: str = Defense.neurons_are

    @property
    def successful(self) -> bool:
        """Whether there is a verdict that speaks for the model, and no damage."""
        good = self.verdict is not None and self.verdict.status in ("removed", "nothing found")
        return good and not self.damaged

    def save(self, folder: str | os.PathLike[str], *, description: str | None = None) -> None:
        """Write `model.safetensors`, `scores.csv` and `result.json` into `folder`, each whole or not at all.

        `description` (`ModelSpec.to_json()`) goes into the checkpoint.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        save_weights(self.model, target / "model.safetensors", description=description)
        if self.scores is None:
            (target / "scores.csv").unlink(missing_ok=True)  # that of an earlier result
        else:
            self.scores.to_csv(target / "scores.csv")
        write_json(
            target / "result.json",
            {
                "method": self.method,
                "options": self.options,
                "found": self.found,
                "seconds": self.seconds,
                "updates": self.updates,
                "warnings": self.warnings,
                "verdict": None if self.verdict is None else self.verdict.as_json(),
                "neurons_reset": self.neurons_reset,
                "neurons": 0 if self.scores is None else len(self.scores),
                "history": as_json(self.history),
            },
        )

    @property
    def neurons_reset(self) -> int:
        """How many neurons the defense reset."""
        return 0 if self.neurons is None else int(self.neurons.sum())


class PurificationError(RuntimeError):
    """A purification that did not do what it should, of a caller who asked to be told by an exception.

    Attributes:
        result: What came out.
    """

    def __init__(self, result: PurifyResult) -> None:
        self.result = result
        got = "no verdict" if result.verdict is None else f"the verdict {str(result.verdict)!r}"
        damage = " and a network that is damaged" if result.damaged else ""
        advice = "leave lr out, so that the method judges itself" if result.verdict is None else "try another method"
        super().__init__(
            f"strict: expected a purification that removes the backdoor or finds none, got {got}{damage}; {advice}, "
            "give more clean images, or look at `result` of this error."
        )
