"""The rows of a history: what a purification did, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Setup:
    """How the run computes; the first row.

    Attributes:
        device: "cpu", "cuda", ...
        precision: "bfloat16", or "as the weights".
        channels_last: Whether the weights were in the channels-last memory format meanwhile.
        notes: What a reader should know about the inputs.
    """

    device: str
    precision: str
    channels_last: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Epoch:
    """A finished epoch of a stage.

    Attributes:
        stage: "unlearn", "fine-tune", "train", ...
        epoch: Counted from 1.
        accuracy: On the batches of the epoch, as the steps saw them.
        loss: Mean loss of the epoch.
        seconds: Wall-clock time.
        updates: Steps of the optimizer.
        held_out: Accuracy on held-out images after the epoch, where it was measured.
    """

    stage: str
    epoch: int
    accuracy: float
    loss: float
    seconds: float
    updates: int
    held_out: float | None = None


@dataclass(frozen=True)
class Probe:
    """A value that was tried for the option that is the method's strength.

    Attributes:
        option: Name of the option.
        value: What was tried.
        accuracy: Held-out clean accuracy that it left.
        floor: The least accuracy that the rule accepts.
        chosen: Whether the rule took this value.
        residual: What it left of the surrogate triggers' effect, where that was measured.
    """

    option: str
    value: float
    accuracy: float
    floor: float
    chosen: bool
    residual: float | None = None

    @property
    def kept(self) -> bool:
        """Whether the accuracy is within the budget."""
        return self.accuracy >= self.floor


Row: TypeAlias = Setup | Epoch | Probe
History: TypeAlias = Sequence[Row]


def as_json(history: History) -> list[dict[str, Any]]:
    """The rows for a file, each with its kind under "row"."""
    return [{"row": type(row).__name__.lower(), **asdict(row)} for row in history]
