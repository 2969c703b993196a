"""What docs/detect.md says of the detectors, and the calibrations that come with bdfast, are what was measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from bdfast.detectors.calibration import SHIPPED, Calibration

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def detection():
    """`bench` lies beside the package and is not installed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "path", [*sys.path, str(ROOT)])
        yield importlib.import_module("bench.detection")


def test_the_tables_of_the_page(detection, capsys):
    detection.table()
    page = (ROOT / "docs" / "detect.md").read_text(encoding="utf-8")
    for table in capsys.readouterr().out.split("\n\n"):
        assert table.strip() in page


def test_the_calibrations(detection):
    rows = [json.loads(line) for line in detection.RESULTS.read_text(encoding="utf-8").splitlines()]
    paths = list(SHIPPED.glob("*.json"))
    assert paths
    for path in paths:
        clean = [row for row in rows if row["method"] == path.stem and row["family"] == "clean"]
        scores = [row["score"] for row in clean if row["seed"] in detection.CALIBRATING]
        assert list(Calibration.load(path).scores) == scores


def test_every_network_was_scanned_once(detection):
    rows = [json.loads(line) for line in detection.RESULTS.read_text(encoding="utf-8").splitlines()]
    names = [network.name for network in detection.every_network()]
    for method in {row["method"] for row in rows}:
        assert sorted(row["name"] for row in rows if row["method"] == method) == sorted(names)


def test_ties_count_half(detection):
    assert detection.auroc([2.0, 1.0], [1.0, 0.0]) == 0.875
