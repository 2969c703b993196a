"""From which score on a network is suspicious: what clean networks get, and how often one of them is accused."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from bdfast.files import write_json
from bdfast.training.descriptions import plain

SHIPPED = Path(__file__).parent / "calibrations"
"""Calibrations that come with bdfast, one JSON file for each detector that has one."""

CONFIDENCE = 0.95
"""Of the intervals."""

FORMAT = 1
HALVINGS = 60


@dataclass(frozen=True)
class FalseAlarms:
    """How many clean networks a threshold accuses.

    Attributes:
        accused: So many scored above the threshold.
        clean: Of so many.
        low: Least rate of false alarms that is compatible with it (Clopper and Pearson, 1934; 95 %).
        high: Greatest one.
    """

    accused: int
    clean: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """The share that is accused."""
        return self.accused / self.clean

    def __str__(self) -> str:
        """In one phrase."""
        return f"{self.accused} of {self.clean} clean networks accused, 95 % interval {self.low:.1%} to {self.high:.1%}"


@dataclass(frozen=True)
class Calibration:
    """What a detector gives to clean networks.

    It holds for networks that are like them: trained in a like manner on like images, and seen with as many clean
    images. `calibrate` makes one from networks of your own; two are added with `+`.

    Attributes:
        method: Name of the detector.
        options: Its options.
        scores: One for each clean network.
        networks: What these are, for people.
    """

    method: str
    options: dict[str, Any]
    scores: tuple[float, ...]
    networks: str

    def threshold(self, false_alarms: float) -> float:
        """The least score that at most this share of networks of this kind exceeds.

        With n clean networks, a new one of their kind exceeds the k-th smallest of their scores with the probability
        1 - k / (n + 1) (as in Vovk et al., "Algorithmic Learning in a Random World", conformal prediction).

        Raises:
            ValueError: There are too few networks to promise that.
        """
        if not 0 < false_alarms < 1:
            raise ValueError(f"false_alarms: expected a share in (0, 1), got {false_alarms}; 0.05 is usual.")
        count = len(self.scores)
        rank = math.ceil((count + 1) * (1 - false_alarms) - 1e-9)
        if rank > count:
            needed = math.ceil(1 / false_alarms - 1 - 1e-9)
            raise ValueError(
                f"false_alarms: expected at least {needed} clean networks for a share of {false_alarms:g}, got {count};"
                " calibrate on more, or allow more false alarms."
            )
        return sorted(self.scores)[rank - 1]

    def false_alarms(self, threshold: float) -> FalseAlarms:
        """How many of the networks that threshold accuses."""
        accused, count = sum(score > threshold for score in self.scores), len(self.scores)
        rest = (1 - CONFIDENCE) / 2
        low = 0.0 if accused == 0 else _share_with(count, accused, rest)
        high = 1.0 if accused == count else _share_with(count, accused + 1, 1 - rest)
        return FalseAlarms(accused, count, low, high)

    def __add__(self, other: Calibration) -> Calibration:
        """Both sets of networks.

        Raises:
            ValueError: They are of different detectors or options.
        """
        if (self.method, self.options) != (other.method, other.options):
            raise ValueError(
                f"calibration: expected one of {self.method} with {self.options}, got one of {other.method} with "
                f"{other.options}; scores of different detectors have no common scale."
            )
        networks = "; ".join(dict.fromkeys([self.networks, other.networks]))
        return replace(self, scores=self.scores + other.scores, networks=networks)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(Path(path), {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            ValueError: The file is something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            scores = tuple(float(score) for score in content.pop("scores"))
            found = cls(str(content.pop("method")), dict(content.pop("options")), scores, str(content.pop("networks")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"calibration: expected a file that Calibration.save wrote, got {os.fspath(path)!r} ({error!r}); make "
                "it anew with bdfast.detectors.calibrate."
            ) from error
        if not found.scores or not all(map(math.isfinite, found.scores)):
            raise ValueError(
                f"calibration: expected finite scores of clean networks, got {found.scores} in {os.fspath(path)!r}; "
                "make it anew with bdfast.detectors.calibrate."
            )
        return found


def options_of(detector: Any) -> dict[str, Any]:
    """The options of a detector as a file holds them: two that are equal in it are the same."""
    return json.loads(json.dumps(plain(asdict(detector))))


@cache
def shipped(method: str) -> Calibration | None:
    """The calibration that comes with bdfast; None where there is none."""
    path = SHIPPED / f"{method}.json"
    return Calibration.load(path) if path.exists() else None


def _share_with(count: int, least: int, probability: float) -> float:
    """The p at which at least `least` of `count` draws succeed with that probability; by halving."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        p = (low + high) / 2
        reached = sum(math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(least, count + 1))
        low, high = (p, high) if reached < probability else (low, p)
    return (low + high) / 2
