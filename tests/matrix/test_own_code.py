"""The section of CONTRIBUTING.md about a user's own attack, network and defense, as it stands there."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from bdfast.cli import main
from bdfast.matrix import read_records

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = TEXT.partition("## An attack, a network and a defense of your own in a grid\n")[2].partition("\n## ")[0]


def block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", SECTION, re.M | re.S)
    return text


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """The files of the section, in the current folder, and its command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mine", None)  # goes again with the test
    (tmp_path / "mine.py").write_text(block("python"))
    (tmp_path / "grid.yaml").write_text(block("yaml"))
    program, *arguments = shlex.split(block("bash"))
    assert program == "bdfast"
    return arguments


@pytest.mark.slow
def test_one_file_and_one_line(own_code, tmp_path, capsys, comparable):
    two = [*own_code, "--threads", "1"]
    main(two)
    assert "8 cells measured, 0 failed, 0 had a record." in capsys.readouterr().err
    records = read_records(tmp_path / "results")
    assert {(x["network"]["name"], x["attack"]["name"], x["defense"]["name"]) for x in records} == {
        ("small_network lr=0.02", attack, defense)
        for attack in ("stripe target=3", "low stripe")
        for defense in ("none", "decay epochs=2")
    }
    # One worker leaves the same records as two.
    one = [*two[: two.index("--workers")], *two[two.index("--workers") + 2 :]]
    one[one.index("results")] = "alone"
    main([*one, "--quiet"])
    assert comparable(tmp_path / "results") == comparable(tmp_path / "alone")
    capsys.readouterr()
    main(["matrix", "show", "results", "--by", "attack,defense"])
    assert "| low stripe |" in capsys.readouterr().out
