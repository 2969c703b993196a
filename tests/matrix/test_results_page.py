"""docs/results.md is what bench/results_page.py makes of the recorded runs."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results_page():
    """`bench` lies beside the package and is not installed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "path", [*sys.path, str(ROOT)])
        yield importlib.import_module("bench.results_page")


def recorded(results_page):
    return [json.loads(line) for line in results_page.RECORDS.read_text(encoding="utf-8").splitlines()]


def test_the_page_is_that_of_the_records(results_page):
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page(recorded(results_page))


def test_only_cells_of_the_grids_count_with_the_split_that_they_have_there(results_page):
    records = recorded(results_page)
    assert results_page.of_the_grids(records) == records
    stranger = {**records[0], "id": "another"}
    forgotten = [{**record, "split": None} for record in records]
    assert results_page.of_the_grids([*forgotten, stranger]) == records


def test_errors_are_counted_and_told_without_their_traceback(results_page):
    records = recorded(results_page)
    broken = next(r for r in records if r["defense"]["kind"] == "uau" and "error" not in r)
    error = {"type": "RuntimeError", "message": "no memory", "during": "purifying", "traceback": "File /home/me"}
    found = {"before", "after", "seconds", "network_digest", "der", "rir", "found", "options", "updates"}
    failed = {key: value for key, value in broken.items() if key not in found} | {"error": error}
    others = [record for record in records if record is not broken]
    text = results_page.page([*others, json.loads(results_page._line(failed))])
    assert "* uau (1): RuntimeError: no memory" in text
    assert "/home/me" not in results_page._line(failed)
    assert text.count("| error |") == results_page.page(records).count("| error |") + 1
