"""Records as tables: rows of cases, columns of defenses, and how many runs stand behind a number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bdfast.errors import nearest
from bdfast.matrix.entries import NONE

Record = dict[str, Any]
KEYS = ("network", "data", "attack", "clean", "defense", "seed", "split")
BY = ("network", "data", "attack", "clean", "defense")
DASH = "\u2013"


@dataclass(frozen=True)
class Spread:
    """One number of several runs, in percent or percentage points.

    Attributes:
        values: One for each run that has the number.
        failed: Runs that ended in an error.
    """

    values: tuple[float, ...] = ()
    failed: int = 0

    @property
    def mean(self) -> float | None:
        """Of the values; None without any."""
        return sum(self.values) / len(self.values) if self.values else None

    def __str__(self) -> str:
        """Mean, least to greatest, and the count; a single value as it is."""
        parts = []
        if len(self.values) == 1:
            parts.append(f"{_short(self.values[0])} (n=1)")
        elif self.values:
            low, high = _short(min(self.values)), _short(max(self.values))
            parts.append(f"{_short(self.mean or 0.0)} ({low} to {high}, n={len(self.values)})")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts) or DASH


@dataclass(frozen=True, eq=False)
class Table:
    """One measure of a set of records.

    Attributes:
        title: What is in it.
        heads: Of the columns that name a row.
        columns: What the others are called.
        rows: The names of each row, and its numbers.
    """

    title: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Spread, ...]], ...]

    def markdown(self) -> str:
        """As a table of Markdown."""
        rows = [[*names, *map(str, spreads)] for names, spreads in self.rows]
        table = markdown_table([*self.heads, *self.columns], rows, names=len(self.heads))
        return f"### {self.title}\n\n{table}\n"


def tables(records: Sequence[Record], by: Sequence[str] = BY) -> list[Table]:
    """ASR after the defense, and the loss of ACC, of records grouped by some of `KEYS`.

    Args:
        records: From `read_records`.
        by: What makes the groups; the last one makes the columns, the others the rows. All else is averaged over.

    Raises:
        ValueError: There is no such key, or less than two.
    """
    _check(by)
    *row_keys, column_key = by
    rows = _grouped(records, row_keys)
    columns = _grouped(records, [column_key])
    if column_key == "defense":  # what no defense leaves is what there was before
        columns = {key: group for key, group in columns.items() if group[0]["defense"]["kind"] != NONE}
    column_names = tuple(_name(group[0], column_key) for group in columns.values())
    asr, loss = [], []
    for group in rows.values():
        names = tuple(_name(group[0], key) for key in row_keys)
        networks = list({record["network_digest"]: record for record in group if "error" not in record}.values())
        inside = [[record for record in group if _identity(record, [column_key]) == column] for column in columns]
        asr.append((names, (_spread(networks, _asr_before), *(_spread(part, _asr) for part in inside))))
        loss.append((names, (_spread(networks, _acc_before), *(_spread(part, _loss) for part in inside))))
    heads = tuple(row_keys)
    return [
        Table("Attack success rate after the defense (ASR, %)", heads, ("before", *column_names), tuple(asr)),
        Table("Loss of clean accuracy (points of ACC)", heads, ("ACC before (%)", *column_names), tuple(loss)),
    ]


def markdown(records: Sequence[Record], by: Sequence[str] = BY) -> str:
    """Both tables with a word on how to read them; arguments and errors as for `tables`."""
    parts = [table.markdown() for table in tables(records, by)]
    return "\n".join([" ".join(notes(records)) + "\n", *parts])


def notes(records: Sequence[Record]) -> list[str]:
    """What a reader has to know about all numbers: how many runs, of what, with which versions."""
    failed = sum("error" in record for record in records)
    seeds = sorted({record["seed"] for record in records})
    said = [
        f"{len(records)} runs; seeds: {', '.join(map(str, seeds))}.",
        "Each number is the mean of n runs, with the least and the greatest beside it; n=1 is one run.",
    ]
    if failed:
        said.append(f"Runs that ended in an error: {failed}.")
    versions = {f"bdfast {x['versions']['bdfast']}, torch {x['versions']['torch']}" for x in records}
    said.append(f"Versions: {'; '.join(sorted(versions))}.")
    return said


def _check(by: Sequence[str]) -> None:
    for key in by:
        if key not in KEYS:
            raise ValueError(f"by: expected some of {', '.join(KEYS)}, got {key!r}; {nearest(key, KEYS)}")
    if len(by) < 2 or len(set(by)) < len(by):
        raise ValueError(
            f"by: expected two or more different keys, the last one for the columns, got {','.join(by)!r}; "
            "attack,defense is an example."
        )


def _identity(record: Record, keys: Sequence[str]) -> str:
    """What entries are, whatever they are called: those that differ in an option are not averaged."""
    values = [record[key] for key in keys]
    contents = [{k: v for k, v in x.items() if k != "name"} if isinstance(x, dict) else x for x in values]
    return json.dumps(contents, sort_keys=True)


def _name(record: Record, key: str) -> str:
    value = record[key]
    if isinstance(value, dict):
        return str(value["name"])
    return DASH if value is None else str(value)


def _grouped(records: Iterable[Record], keys: Sequence[str]) -> dict[str, list[Record]]:
    """Records that agree in these keys, by the names of the entries; "none" comes first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_identity(record, keys), []).append(record)

    def names(item: tuple[str, list[Record]]) -> list[tuple[bool, str]]:
        return [(name != NONE, name) for name in (_name(item[1][0], key) for key in keys)]

    return dict(sorted(groups.items(), key=names))


def _spread(records: Iterable[Record], of: Callable[[Record], float | None]) -> Spread:
    records = list(records)
    values = [of(record) for record in records if "error" not in record]
    return Spread(
        tuple(100 * value for value in values if value is not None), sum("error" in record for record in records)
    )


def _asr(record: Record) -> float | None:
    return record["after"]["asr"]


def _asr_before(record: Record) -> float | None:
    return record["before"]["asr"]


def _acc_before(record: Record) -> float | None:
    return record["before"]["acc"]


def _loss(record: Record) -> float | None:
    return record["before"]["acc"] - record["after"]["acc"]


def _short(value: float) -> str:
    text = f"{value:.1f}"
    return "0.0" if text == "-0.0" else text


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, names: int) -> str:
    """Rows of texts as Markdown; the first `names` columns are names, the others numbers."""
    marks = ["---"] * names + ["---:"] * (len(heads) - names)
    return "\n".join(map(_line, (heads, marks, *rows)))


def _line(cells: Iterable[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"
