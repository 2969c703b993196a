"""What the figures draw of a history: rounds, stages, and what was undone."""

import pytest

from bdfast.report import curves, figures
from bdfast.training import Epoch, Probe


def test_rounds_of_a_stage_follow_one_another():
    rounds = [Epoch(f"fine-tune{name}", e, 0.1 * e, 1.0, 1.0, 12) for name in ("", ", round 2") for e in (1, 2)]
    (only,) = curves.curve(rounds, "fine-tune")
    assert only == curves.Part(None, [(1, 0.1), (2, 0.2), (3, 0.1), (4, 0.2)], kept=True)
    assert curves.end([only]) == 0.2


def staged(*chosen: bool) -> list[Epoch | Probe]:
    """A stage of two rounds for each rate, and which of the rates was chosen."""
    rates = ("0.003", "0.01", "0.03")[: len(chosen)]
    epochs = [
        Epoch(f"fine-tune at {rate}, round {r}", 1, 0.9 - 0.1 * i + 0.01 * r, 1.0, 1.0, 12)
        for i, rate in enumerate(rates)
        for r in (1, 2)
    ]
    return [*epochs, *(Probe("lr", float(rate), 0.9, 0.8, chosen=c) for rate, c in zip(rates, chosen, strict=True))]


@pytest.mark.parametrize(
    ("chosen", "kept", "end"),
    [
        ((True, False), [True, False], 0.92),
        ((False, True), [True, True], 0.82),
        ((False, True, False), [True, True, False], 0.82),
        ((False, False), [False, False], None),
    ],
)
def test_what_was_undone_is_told_from_what_was_kept(chosen, kept, end):
    parts = curves.curve(staged(*chosen), "fine-tune")
    assert [part.kept for part in parts] == kept
    assert [part.rate for part in parts] == ["0.003", "0.01", "0.03"][: len(chosen)]
    assert [point[0] for part in parts for point in part.points] == list(range(1, 2 * len(chosen) + 1))
    (unlearning,) = curves.curve([Epoch("unlearn", 1, 0.5, 1.0, 1.0, 12), *staged(*chosen)], "unlearn")
    assert unlearning.kept
    assert curves.end(parts) == (None if end is None else pytest.approx(end))
    figure = figures.accuracy(staged(*chosen))
    assert [line.get_color() == figures.MUTED for line in figure.axes[0].lines] == [not part for part in kept]
    assert {"lr 0.003", "lr 0.01"} <= {text.get_text() for text in figure.axes[0].texts}
