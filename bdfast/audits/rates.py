"""ACC and the rate of a trigger, and when a rate counts as back."""

from __future__ import annotations

from dataclasses import dataclass

ROSE = 0.2
"""How much a rate has to rise until it counts as back, and what it has to be until it counts as there. Ours."""


@dataclass(frozen=True)
class Figures:
    """What a network shows on the images that the audit measures on, as fractions.

    Attributes:
        acc: Clean images that are classified right.
        rate: Images with the trigger that are classified as its target label: the ASR for the trigger of the attack,
            a surrogate rate for a surrogate trigger; None without a trigger.
    """

    acc: float
    rate: float | None = None

    def as_json(self, rate_name: str) -> dict[str, float | None]:
        """Both by name; a surrogate rate is never called ASR."""
        return {"acc": self.acc, rate_name: self.rate}


def share(value: float | None) -> str:
    """0.9218 as '92.2 %'."""
    return "unknown" if value is None else f"{100 * value:.1f} %"


def rises(rate: float | None, start: float | None) -> bool:
    """Whether a rate is above its start by `ROSE` or more."""
    return rate is not None and start is not None and rate - start >= ROSE
