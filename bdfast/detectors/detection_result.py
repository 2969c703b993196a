"""What `detect` returns."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

from bdfast.detectors.calibration import FalseAlarms
from bdfast.files import whole_file, write_json
from bdfast.inversion.scene import ALL_TO_ALL


@dataclass(frozen=True, eq=False)
class Detection:
    """Whether a network looks as if it had a backdoor, and on what grounds.

    A score below the threshold is no proof of a clean network: every detector is blind to some triggers. One above it
    is no proof of a backdoor: `false_alarms` says how often clean networks get there.

    Attributes:
        method: Name of the detector.
        suspicious: Whether `score` is above `threshold`.
        score: Greater is more suspicious, on a scale of the detector's own.
        scored_by: What it is, for people.
        threshold: See `suspicious`.
        threshold_from: Where the threshold comes from.
        false_alarms: How many clean networks it accuses; None where nobody has measured that.
        targets: Suspected target labels, the most suspicious first; (-1,) for a trigger with a target for each label.
            Those of a network that is not suspicious are only the likeliest.
        evidence: By name, a figure for each class; NaN for a class that was not looked at.
        trigger: [C, H, W], the trigger that was guessed; None where the detector guesses none.
        mask: [1 or C, H, W] in [0, 1], where the trigger covers the image; None for one that is added.
        limits: Least and greatest pixel value of the clean images.
        options: Every option of the detector with its value, and the seed.
        seconds: Wall-clock time.
        notes: What to know when reading it.
    """

    method: str
    suspicious: bool
    score: float
    scored_by: str
    threshold: float
    threshold_from: str
    false_alarms: FalseAlarms | None
    targets: tuple[int, ...]
    evidence: dict[str, list[float]]
    trigger: Tensor | None
    mask: Tensor | None
    limits: tuple[float, float]
    options: dict[str, Any]
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """In one line."""
        what = "suspicious" if self.suspicious else "not suspicious"
        if self.suspicious and self.targets:
            labels = ", ".join(map(str, self.targets))
            what += ": all-to-all" if ALL_TO_ALL in self.targets else f": target label {labels}"
        above = "above" if self.suspicious else "not above"
        return f"{what}; score {self.score:.3g}, {above} {self.threshold:.3g}"

    def picture(self) -> Tensor | None:
        """The trigger as an image [C, H, W] in [0, 1]: on black if it covers the image, around grey if it is added."""
        if self.trigger is None:
            return None
        trigger = self.trigger.detach().float().cpu()
        low, high = self.limits
        if self.mask is None:
            return 0.5 + 0.5 * trigger / trigger.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        return ((trigger - low) / (high - low)).clamp(0, 1) * self.mask.detach().float().cpu()

    def as_json(self) -> dict[str, Any]:
        """For a file: everything but the trigger."""
        alarms = self.false_alarms
        return {
            "method": self.method,
            "suspicious": self.suspicious,
            "score": self.score,
            "scored_by": self.scored_by,
            "threshold": self.threshold,
            "threshold_from": self.threshold_from,
            "false_alarms": None
            if alarms is None
            else {"accused": alarms.accused, "clean": alarms.clean, "low": alarms.low, "high": alarms.high},
            "targets": list(self.targets),
            "evidence": self.evidence,
            "options": self.options,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `detection.json`, and `trigger.png` where there is a trigger, into `folder`."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        picture = self.picture()
        if picture is None:
            (target / "trigger.png").unlink(missing_ok=True)  # that of an earlier result
        else:
            shown = picture if len(picture) in (1, 3) else picture.mean(0, keepdim=True)
            with whole_file(target / "trigger.png") as temporary:
                save_image(shown, temporary, format="png")
        write_json(target / "detection.json", self.as_json())
