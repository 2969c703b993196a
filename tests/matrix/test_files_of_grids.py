"""The grids that docs and benchmarks have."""

import re
from pathlib import Path

import pytest
import yaml

from bdfast.matrix import parse_grid, read_records

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)


@pytest.mark.parametrize(("index", "cells"), [(0, 20), (1, 21)])
def test_grids_of_the_docs(index, cells):
    assert len(parse_grid(blocks("yaml")[index]).cells) == cells


def test_python_of_the_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks("python")), {})
    assert len(read_records("results")) == 2
    assert "RunSummary(measured=2, failed=0, skipped=0)" in capsys.readouterr().out


def test_the_development_grid_is_as_varied_as_it_says():
    grids = yaml.safe_load((ROOT / "bench" / "grids" / "development.yaml").read_text(encoding="utf-8"))["grids"]
    assert [block["split"] for block in grids] == ["tune", "confirm"]
    cases = [case for block in grids for case in block["cases"]]
    assert len(cases) >= 30
    attacks = [{"attack": x} if isinstance(x := case["attack"], str) else x for case in cases]
    assert sum(attack["attack"] == "none" for attack in attacks) >= 6
    assert len({attack.get("target", 0) for attack in attacks}) == 10
    assert sum(attack.get("targets") == "all-to-all" for attack in attacks) >= 2
    assert {attack.get("poison_rate", 0.1) for attack in attacks} == {0.1, 0.05, 0.01}
    assert {str(case["clean"]) for case in cases} == {"0.05", "0.01", "{'per_class': 10}"}
    tuned, confirmed = ({case["network"]["arch"] for case in block["cases"]} for block in grids)
    assert len(tuned | confirmed) >= 7
    assert confirmed - tuned
