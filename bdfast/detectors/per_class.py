"""What detectors share that look at one class after another."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

NORMAL = 1.4826
"""The median absolute deviation times this is the standard deviation of a normal distribution."""

LEAST_SPREAD = 0.05
"""Least spread, as a share of the median: where the figures of most classes are nearly the same, one that is a few
percent away would be an outlier."""


def chosen(classes: tuple[int, ...] | None, count: int) -> list[int]:
    """The labels to look at, in rising order.

    Args:
        classes: Those that the user wants; None for all.
        count: Of the network's classes.

    Raises:
        ValueError: The network has no such label.
    """
    if classes is None:
        return list(range(count))
    if not classes or min(classes) < 0 or max(classes) >= count:
        raise ValueError(
            f"classes: expected labels in 0..{count - 1}, got {classes}; leave them out to look at all of them."
        )
    return sorted(set(classes))


def over_all(labels: Sequence[int], values: Sequence[float], count: int) -> list[float]:
    """`values` at the places of their labels; NaN for the other labels of 0..count - 1."""
    known = dict(zip(labels, values, strict=True))
    return [known.get(label, float("nan")) for label in range(count)]


def anomaly_indices(values: Sequence[float]) -> list[float]:
    """|v - median| / (1.4826 MAD): Wang et al., "Neural Cleanse" (S&P 2019).

    MAD is the median of |v - median|. Ours is only that it is at least `LEAST_SPREAD` of the median.

    Args:
        values: At least one, none of them NaN.
    """
    middle = statistics.median(values)
    spread = statistics.median(abs(value - middle) for value in values)
    unit = NORMAL * max(spread, LEAST_SPREAD * abs(middle))
    return [abs(value - middle) / unit if unit else 0.0 for value in values]
