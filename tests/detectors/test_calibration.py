"""Thresholds from clean networks, and how many of them are accused."""

import json
import math

import pytest

from bdfast.detectors import METHODS, Calibration
from bdfast.detectors.calibration import SHIPPED, shipped


def calibration(scores, **changes):
    return Calibration(
        **{"method": "mine", "options": {"k": 1}, "networks": "twenty", "scores": tuple(scores), **changes}
    )


@pytest.mark.parametrize(("count", "share", "rank"), [(19, 0.05, 19), (20, 0.05, 20), (39, 0.05, 38), (99, 0.1, 90)])
def test_the_threshold_is_the_score_that_a_new_network_exceeds_as_seldom_as_asked(count, share, rank):
    scores = [float(score) for score in range(1, count + 1)]
    threshold = calibration(reversed(scores)).threshold(share)
    assert threshold == rank
    # The scores are their own ranks, and a new network is as likely to fall between any two of them.
    assert 1 - threshold / (count + 1) <= share + 1e-12
    assert 1 - (threshold - 1) / (count + 1) > share + 1e-12


def test_too_few_networks_promise_nothing():
    with pytest.raises(
        ValueError, match=r"false_alarms: expected at least 19 clean networks for a share of 0.05, got 18"
    ):
        calibration(range(18)).threshold(0.05)
    assert calibration(range(19)).threshold(0.05) == 18
    with pytest.raises(ValueError, match=r"false_alarms: expected a share in \(0, 1\), got 1"):
        calibration(range(19)).threshold(1)


def test_the_interval_of_the_rate_is_that_of_clopper_and_pearson():
    """Where none of n is accused, and all, there is a closed form; else the tails of the binomial distribution."""
    none = calibration(range(24)).false_alarms(23.0)
    assert (none.accused, none.clean, none.low) == (0, 24, 0.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 24), abs=1e-12)
    every = calibration(range(24)).false_alarms(-1.0)
    assert every.high == 1.0
    assert every.low == pytest.approx(0.025 ** (1 / 24), abs=1e-12)
    some = calibration(range(24)).false_alarms(20.5)
    assert some.accused == 3

    def at_least(k, p):
        return sum(math.comb(24, j) * p**j * (1 - p) ** (24 - j) for j in range(k, 25))

    assert at_least(3, some.low) == pytest.approx(0.025, abs=1e-9)
    assert 1 - at_least(4, some.high) == pytest.approx(0.025, abs=1e-9)
    assert str(some) == "3 of 24 clean networks accused, 95 % interval 2.7% to 32.4%"


def test_a_file_brings_the_same_back(tmp_path):
    calibration([0.25, 0.5]).save(tmp_path / "mine.json")
    assert Calibration.load(tmp_path / "mine.json") == calibration([0.25, 0.5])


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1, "method": "x", "options": {}, "networks": "", "scores": []}'],
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ValueError, match="calibration: expected "):
        Calibration.load(tmp_path / "mine.json")


def test_scores_that_are_no_numbers_are_refused(tmp_path):
    content = {"format": 1, "method": "x", "options": {}, "networks": "", "scores": [1.0, float("nan")]}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="calibration: expected finite scores"):
        Calibration.load(tmp_path / "mine.json")


def test_calibrations_of_one_detector_add_up():
    both = calibration([1.0]) + calibration([2.0], networks="of my own")
    assert both.scores == (1.0, 2.0)
    assert both.networks == "twenty; of my own"
    assert (both + both).networks == both.networks
    with pytest.raises(ValueError, match="calibration: expected one of mine with"):
        calibration([1.0]) + calibration([1.0], options={"k": 2})


def test_what_comes_with_bdfast_is_of_the_default_options():
    for path in SHIPPED.glob("*.json"):
        found = shipped(path.stem)
        assert found.method == path.stem
        assert found.options == vars(METHODS[path.stem]())
        assert len(found.scores) >= 19
    assert shipped("nothing of that name") is None
