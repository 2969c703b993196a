import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import nn

from bdfast import attacks, defenses
from bdfast.matrix import Grid, parse_grid, read_records
from bdfast.models import ARCHITECTURES, register_model

SMALL = textwrap.dedent(
    """
    epochs: 1
    networks: [{arch: speck, lr: 0.02}]
    data: [digits]
    attacks: [{attack: badnets, target: 3}, {attack: none, trigger: badnets}]
    clean: [0.1, {per_class: 5}]
    defenses: [none, {defense: ft, epochs: 1, lr: 0.02, amp: false}]
    seeds: [0]
    """
)


@pytest.fixture(autouse=True)
def speck() -> Iterator[None]:
    """A network for 8x8 images that trains in a moment; and what a test registers goes again."""
    tables = (ARCHITECTURES, attacks.METHODS, defenses.METHODS)
    before = [dict(table) for table in tables]

    def build(spec) -> nn.Module:
        first = nn.Conv2d(spec.in_channels, 4, 3, stride=2)
        return nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(36, spec.num_classes))

    register_model("speck", build)
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)


@pytest.fixture
def small() -> Grid:
    """A grid of eight cells and two networks."""
    return parse_grid(SMALL, "small.yaml")


@pytest.fixture
def change() -> Callable[[str, str], str]:
    """The text of the small grid with one line of it replaced."""

    def changed(key: str, line: str) -> str:
        lines = [line if old.startswith(f"{key}:") else old for old in SMALL.splitlines()]
        assert line in lines
        return "\n".join(lines)

    return changed


@pytest.fixture
def comparable() -> Callable[[Path], list[dict]]:
    """The records in a folder without times and memory, which no two runs share."""

    def stripped(folder: Path) -> list[dict]:
        records = read_records(folder)
        for record in records:
            record.pop("seconds", None)
            record.pop("peak_memory_mib", None)
        return records

    return stripped
