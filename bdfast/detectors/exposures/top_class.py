"""How far predictions gather in one class, by three rules, each as a multiple of its threshold."""

from collections.abc import Sequence
from typing import Literal

Rule = Literal["errors", "scale_free", "variance"]

ERRORS, SHARE, VARIANCE = 1 / 2, 1 / 3, 0.01
"""Thresholds of the rules; the last is the published one, and the second is the same for ten classes."""


def statistic(shares: Sequence[float], rule: Rule) -> float:
    """What a rule makes of the share of each class: above 1, the network is called backdoored. See `EBYD`."""
    mean = 1 / len(shares)
    if rule == "variance":
        return sum((share - mean) ** 2 for share in shares) / len(shares) / VARIANCE
    return max(0.0, (max(shares) - mean) / (1 - mean) / (ERRORS if rule == "errors" else SHARE))
