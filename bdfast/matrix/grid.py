"""Grid files: YAML in, cells out. The format stands in docs/matrix.md."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from bdfast.data.sources import SOURCES
from bdfast.errors import nearest
from bdfast.matrix.cells import AXES, Cell
from bdfast.matrix.clean_images import Clean, clean_entry
from bdfast.matrix.entries import AttackEntry, NetworkEntry, attack_entry, defense_entry, epoch_count, network_entry
from bdfast.matrix.places import GridError, Place, read_yaml

SPLITS = ("tune", "confirm")
PRODUCT = ("networks", "data", "attacks", "clean")
CASE = ("network", "data", "attack", "clean")
OTHERS = ("defenses", "seeds", "exclude", "epochs", "split")


class Case(NamedTuple):
    """What a defense is tried on."""

    network: NetworkEntry
    data: str
    attack: AttackEntry
    clean: Clean
    split: str | None
    place: Place


@dataclass(frozen=True, eq=False)
class Grid:
    """The cells of a grid file.

    Attributes:
        cells: One after another, each once.
        file: Where they come from.
    """

    cells: list[Cell]
    file: str = "grid"


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """Read a grid file. What it says of the data is not looked at yet; `check_grid` does that.

    Raises:
        FileNotFoundError: There is no such file.
        GridError: Something in it is wrong; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"grid: expected a YAML file, found no {path}; check the name.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GridError(f"{path.name}: expected text in UTF-8, got something else ({error}); mend it.") from error
    return parse_grid(text, path.name)


def parse_grid(text: str, file: str = "grid") -> Grid:
    """The grid of a YAML text; `file` is what messages call it.

    Raises:
        GridError: Something in it is wrong; the message names the line.
    """
    content, place = read_yaml(text, file)
    blocks = [(content, place)]
    if isinstance(content, dict) and "grids" in content:
        blocks = place["grids"].listed(place.mapping(content, ["grids"])["grids"])
    cells: dict[str, Cell] = {}
    names: dict[tuple[str, str], Any] = {}
    for block, where in blocks:
        for cell in _cells(block, where):
            if cell.id in cells:
                raise where.error(f"expected every cell once, got ({cell}) again; take it out of one of the lists.")
            cells[cell.id] = cell
            for axis in ("network", "attack", "defense"):
                entry = getattr(cell, axis)
                if names.setdefault((axis, entry.name), entry.content()) != entry.content():
                    raise GridError(
                        f"{entry.place}: expected a name for one {axis} only, got {entry.name!r} for two that differ; "
                        "give one of them another name."
                    )
    return Grid(list(cells.values()), file)


def _cells(block: Any, place: Place) -> list[Cell]:
    """The cells of one block, without those that it excludes."""
    by_case = isinstance(block, dict) and "cases" in block
    block = place.mapping(block, ["cases", *OTHERS] if by_case else [*PRODUCT, "cases", *OTHERS])
    for key in [*(["cases"] if by_case else PRODUCT), "defenses", "seeds"]:
        if key not in block:
            raise place.error(f"expected {key}, got none; add a list of them.")
    epochs = epoch_count(block.get("epochs"), place["epochs"])
    split = _split(block.get("split"), place["split"])
    cases = list(_listed_cases(block, place, split) if by_case else _product(block, place, split))
    chosen = _axis(block, place, "defenses", defense_entry)
    seeds = _axis(block, place, "seeds", _seed)
    cells = [
        Cell(case.network, case.data, case.attack, case.clean, defense, seed, epochs=epochs, split=case.split)
        for case, seed, defense in product(cases, seeds, chosen)
    ]
    kept = _without(block.get("exclude"), cells, place["exclude"]) if "exclude" in block else cells
    if not kept:
        raise place["exclude"].error("expected some cells to be left, got none; exclude less.")
    return kept


def _product(block: dict[str, Any], place: Place, split: str | None) -> Iterator[Case]:
    axes = (network_entry, _data_name, attack_entry, clean_entry)
    entries = [_axis(block, place, key, parse) for key, parse in zip(PRODUCT, axes, strict=True)]
    for network, data, attack, clean in product(*entries):
        yield Case(network, data, attack, clean, split, place)


def _listed_cases(block: dict[str, Any], place: Place, split: str | None) -> Iterator[Case]:
    for value, where in place["cases"].listed(block["cases"]):
        value = where.mapping(value, [*CASE, "split"])
        for key in CASE:
            if key not in value:
                raise where.error(f"expected {key}, got none; a case has {', '.join(CASE)}.")
        yield Case(
            network_entry(value["network"], where["network"]),
            _data_name(value["data"], where["data"]),
            attack_entry(value["attack"], where["attack"]),
            clean_entry(value["clean"], where["clean"]),
            _split(value.get("split", split), where["split"]),
            where,
        )


def _axis(block: dict[str, Any], place: Place, key: str, parse: Callable[[Any, Place], Any]) -> list[Any]:
    """The entries of a list, each once."""
    entries: list[Any] = []
    contents: list[Any] = []
    for value, where in place[key].listed(block[key]):
        entry = parse(value, where)
        content = entry.content() if hasattr(entry, "content") else entry
        if content in contents:
            raise where.error(f"expected every entry once, got that of {key}[{contents.index(content)}]; remove one.")
        entries.append(entry)
        contents.append(content)
    return entries


def _data_name(value: Any, place: Place) -> str:
    known = tuple(SOURCES)
    if not isinstance(value, str) or value not in known:
        raise place.error(f"expected one of {', '.join(known)}, got {value!r}; {nearest(str(value), known)}")
    return value


def _seed(value: Any, place: Place) -> int:
    if type(value) is not int or value < 0:
        raise place.error(f"expected a whole number, 0 or more, got {value!r}; seeds are a list such as [0, 1, 2].")
    return value


def _split(value: Any, place: Place) -> str | None:
    if value is not None and value not in SPLITS:
        raise place.error(f"expected one of {', '.join(SPLITS)}, got {value!r}; {nearest(str(value), SPLITS)}")
    return value


def _without(exclude: Any, cells: list[Cell], place: Place) -> list[Cell]:
    """The cells that no entry of `exclude` matches in all that it names."""
    for value, where in place.listed(exclude):
        value = where.mapping(value, AXES)
        if not value:
            raise where.error(f"expected keys of {', '.join(AXES)}, got none; it would exclude everything.")
        wanted = {axis: _wanted(axis, part, cells, where[axis]) for axis, part in value.items()}
        left = [cell for cell in cells if not all(_called(cell, axis) & names for axis, names in wanted.items())]
        if len(left) == len(cells):
            raise where.error(f"expected an entry that matches some of the cells, got {value!r}, which does not.")
        cells = left
    return cells


def _wanted(axis: str, value: Any, cells: list[Cell], place: Place) -> set[str]:
    """What an entry of `exclude` asks of one axis: any of these names."""
    known = sorted({name for cell in cells for name in _called(cell, axis)})
    names = set()
    for part in value if isinstance(value, list) else [value]:
        name = clean_entry(part, place).name if axis == "clean" else str(part)
        if name not in known:
            raise place.error(f"expected one of {', '.join(known)}, got {name!r}; {nearest(name, known)}")
        names.add(name)
    return names


def _called(cell: Cell, axis: str) -> set[str]:
    """The names of an entry: its own, and that of its kind."""
    entry = getattr(cell, axis)
    return {entry.name, entry.kind} if hasattr(entry, "kind") else {getattr(entry, "name", str(entry))}
