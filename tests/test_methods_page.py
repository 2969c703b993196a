"""docs/methods.md is what bench/methods_page.py makes of the classes, and README names every method."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from bdfast.defenses import METHODS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def methods_page(monkeypatch):
    """`bench` lies beside the package and is not installed."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    return importlib.import_module("bench.methods_page")


def test_the_page_is_that_of_the_classes(methods_page):
    written = methods_page.PAGE.read_text(encoding="utf-8")
    assert written == methods_page.page()
    assert [line.removeprefix("## ") for line in written.splitlines() if line.startswith("## ")][1:-1] == list(METHODS)


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("rnp", "| `recover_lr` | `0.004` | `0.04` | Learning rate of the masks."),
        ("ft_sam", "| `rho` | `1.0` | `2.0` | Radius"),
        ("ft_sam", "| `weight_decay`"),
    ],
)
def test_a_table_has_what_is_other_than_in_all_methods_of_the_kind(methods_page, method, row):
    assert (row in methods_page.options(method)) == ("weight_decay" not in row)


def test_every_option_is_described(methods_page):
    for method in METHODS:
        assert not re.search(r"\| *\|", methods_page.options(method)), method


def test_readme_names_every_method_with_its_class():
    rows = re.findall(r'^\| `"(\w+)"` \|.*\| `(\w+)` \|', (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(rows) == sorted((name, cls.__name__) for name, cls in METHODS.items())
