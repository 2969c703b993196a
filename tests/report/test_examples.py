import pytest
import torch

from bdfast import report
from bdfast.report import figures


def make_examples(count=3, channels=3, side=16, **changes):
    clean = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))
    triggered = clean.clone()
    triggered[..., -3:, -3:] = 1
    labels = [i % 3 + 1 for i in range(count)]
    values = {
        "clean": clean,
        "triggered": triggered,
        "labels": labels,
        "clean_before": labels,
        "clean_after": labels,
        "triggered_before": [0] * count,
        "triggered_after": labels,
        "class_names": ["plane", "car", "bird", "cat"],
        "targets": [0] * count,
    }
    return report.Examples(**(values | changes))


@pytest.mark.parametrize(("count", "channels", "side"), [(1, 1, 8), (40, 3, 300)])
def test_examples_of_any_size_fit(count, channels, side):
    examples = make_examples(count, channels, side)
    tiles, gain = examples.tiles()
    assert len(tiles) == min(count, 6)
    assert all(tile.shape == (min(side, 128), min(side, 128), 3) for row in tiles for tile in row)
    assert gain == pytest.approx(1 / (examples.triggered - examples.clean)[:6].max().item())
    assert len(figures.examples(examples).axes) == 3 * len(tiles)


def test_examples_tell_right_wrong_and_attacked():
    examples = make_examples(clean_after=[1, 0, 3], triggered_after=[1, 2, 2])
    assert examples.outcomes(1) == (
        [("bird", True, False), ("plane", False, False)],
        [("plane", False, True), ("bird", True, False)],
    )
    assert examples.outcomes(2)[1][1] == ("bird", False, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": torch.zeros(3, 16, 16)}, r"clean: expected shape \[K, C, H, W\] .*, got \(3, 16, 16\);"),
        ({"triggered": torch.zeros(3, 3, 8, 8)}, r"triggered: expected shape .* like clean, got \(3, 3, 8, 8\);"),
        ({"clean": torch.full((3, 3, 16, 16), -2.0)}, r"clean: expected values in \[0, 1\], got -2 to -2;"),
        ({"clean": torch.full((3, 3, 16, 16), float("nan"))}, r"clean: expected values in \[0, 1\], got nan to nan;"),
        ({"triggered_after": [1]}, "triggered_after: expected 3 entries, one per image, got 1;"),
        ({"clean_before": [0, 4, 0]}, r"clean_before\[1\]: expected a class from 0 to 3, got 4;"),
        ({"targets": [0, 0, -1]}, r"targets\[2\]: expected a class from 0 to 3, got -1;"),
    ],
)
def test_examples_refuse_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        make_examples(**changes)
