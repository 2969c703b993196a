"""Writes docs/results.md from the records of the grids in bench/grids.

    .venv/bin/python -m bench.results_page results  # takes the records of this folder over first
    .venv/bin/python -m bench.results_page  # from those in bench/results/matrix.jsonl

All are run into one folder, so that they share networks:

    bdfast matrix run bench/grids/attacks.yaml --output results --workers 2 --threads 1
    bdfast matrix run bench/grids/seeds.yaml --output results --workers 2 --threads 1
    bdfast matrix run bench/grids/data_free.yaml --output results --workers 2 --threads 1
    bdfast matrix run bench/grids/development.yaml --output results --workers 2 --threads 1
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, median

import tyro
from jinja2 import Environment, StrictUndefined

from bdfast.files import whole_file
from bdfast.matrix import read_grid, read_records
from bdfast.matrix.tables import DASH, Record, markdown_table
from bench.data_free import data_free_table
from bench.record_facts import attack_of, loss_of, percent
from bench.spreads import attacks_table, seeds_table

HERE = Path(__file__).parent
RECORDS = HERE / "results" / "matrix.jsonl"
TEMPLATE = HERE / "results.md.j2"
SEEDS = HERE / "grids" / "seeds.yaml"
GRIDS = tuple(HERE / "grids" / name for name in ("attacks.yaml", "seeds.yaml", "data_free.yaml", "development.yaml"))
"""A cell that is in several of them has the split that the last one gives it."""
PAGE = HERE.parent / "docs" / "results.md"
REMOVED, KEPT = 0.1, 0.5
"""ASR below which a backdoor counts as removed, and from which it counts as kept."""
WRONGLY_REMOVED, WRONGLY_KEPT = 0.15, 0.05
"""ASR above which "removed" is wrong, and below which "not removed" is."""
LOST, CHANCE = 0.05, 0.2
"""Loss of ACC above which a network counts as damaged, and the ACC below which nothing is left of it."""


@dataclass(frozen=True)
class Arguments:
    """Attributes:
    folder: Output folder of the runs.
    """

    folder: tyro.conf.Positional[Path | None] = None


def main() -> None:
    folder = tyro.cli(Arguments, description=__doc__).folder
    if folder is not None:
        with whole_file(RECORDS) as temporary:
            temporary.write_text("".join(map(_line, of_the_grids(read_records(folder)))), encoding="utf-8")
    records = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    with whole_file(PAGE) as temporary:
        temporary.write_text(page(records), encoding="utf-8")


def of_the_grids(records: Sequence[Record]) -> list[Record]:
    """The records of cells that are in the grids, in their order, each with the split that its cell has there."""
    found = {record["id"]: record for record in records}
    cells = {cell.id: cell for grid in GRIDS for cell in read_grid(grid).cells}
    return [{**found[name], "split": cell.split} for name, cell in cells.items() if name in found]


def _line(record: Record) -> str:
    if "error" in record:  # a traceback names folders of the machine
        record = {**record, "error": {key: value for key, value in record["error"].items() if key != "traceback"}}
    return json.dumps(record, sort_keys=True) + "\n"


def page(records: Sequence[Record]) -> str:
    """The whole page, as Markdown."""
    grid = [record for record in records if record["split"]]
    cases = {_case(record): record for record in grid}.values()
    networks = {r["network_digest"]: r["seconds"]["training"] for r in grid if "network_digest" in r}
    purifying = sum(r["seconds"]["purifying"] for r in grid if "seconds" in r and r["defense"]["kind"] != "none")
    template = Environment(undefined=StrictUndefined).from_string(TEMPLATE.read_text(encoding="utf-8"))
    three = {cell.id for cell in read_grid(SEEDS).cells}
    asked = len({cell.id for path in GRIDS for cell in read_grid(path).cells})
    text = template.render(
        asked=asked,
        missing=asked - len(records),
        cases={
            "total": len(cases),
            "clean": sum(record["attack"]["kind"] == "none" for record in cases),
            **{split: sum(record["split"] == split for record in cases) for split in ("tune", "confirm")},
        },
        seeds=", ".join(sorted({str(record["seed"]) for record in grid})),
        versions="; ".join(sorted({"bdfast {bdfast}, torch {torch}".format(**r["versions"]) for r in records})),
        machines="; ".join(sorted({"{processor}, {threads} thread a worker".format(**r["machine"]) for r in records})),
        networks=len(networks),
        training=round(sum(networks.values()) / 60),
        purifying=round(purifying / 60),
        removed=f"{100 * REMOVED:g} %",
        kept=f"{100 * KEPT:g} %",
        lost=round(100 * LOST),
        chance=f"{100 * CHANCE:g} %",
        attacks=attacks_table(records),
        summary={split: _summary(grid, split) for split in ("tune", "confirm")},
        every={split: _cases(grid, split) for split in ("tune", "confirm")},
        shares=_shares(grid),
        verdicts=_verdicts(grid),
        wrong=[f"{100 * limit:g} %" for limit in (WRONGLY_REMOVED, WRONGLY_KEPT)],
        three=seeds_table([record for record in records if record["id"] in three]),
        data_free=data_free_table(records),
        errors=_errors(grid),
    )
    return text.rstrip() + "\n"


def _case(record: Record) -> str:
    return json.dumps([record[key] for key in ("network", "data", "attack", "clean", "seed")], sort_keys=True)


def _summary(grid: Sequence[Record], split: str) -> str:
    runs = [r for r in grid if r["split"] == split and r["defense"]["kind"] != "none"]
    lines = []
    for defense in _defenses(runs):
        own = [r for r in runs if r["defense"]["name"] == defense]
        sound = [r for r in own if "error" not in r]
        backdoored = [r for r in sound if r["attack"]["kind"] != "none" and (r["before"]["asr"] or 0) >= KEPT]
        clean = [r for r in sound if r["attack"]["kind"] == "none"]
        lines.append(
            [
                defense,
                _share(backdoored, lambda r: r["after"]["asr"] < REMOVED and loss_of(r) <= LOST),
                _share(backdoored, lambda r: r["after"]["asr"] >= KEPT),
                _damaged(backdoored),
                _damaged(clean),
                percent(median([r["after"]["asr"] for r in backdoored])) if backdoored else DASH,
                percent(median([loss_of(r) for r in sound])) if sound else DASH,
                percent(max(loss_of(r) for r in sound)) if sound else DASH,
                f"{median([r['seconds']['purifying'] for r in sound]):.0f}" if sound else DASH,
                str(len(own) - len(sound)),
            ]
        )
    heads = ["defense", "removed", "kept", "damaged", "of the clean networks, damaged", "median ASR (%)"]
    heads += ["median loss (points)", "greatest loss", "median seconds", "errors"]
    return markdown_table(heads, lines, names=1)


def _shares(grid: Sequence[Record]) -> str:
    attacked = [
        r for r in grid if "error" not in r and r["attack"]["kind"] != "none" and r["defense"]["kind"] != "none"
    ]
    lines = []
    for defense in _defenses(attacked):
        for name, wanted in (("5 %", True), ("fewer", False)):
            own = [r for r in attacked if r["defense"]["name"] == defense and (r["clean"]["name"] == "5 %") is wanted]
            if own:
                under = [_share(own, lambda r, most=most: r["after"]["asr"] <= most) for most in (0.05, 0.1, 0.15)]
                losses, ders = [loss_of(r) for r in own], [r["der"] for r in own]
                figures = [percent(sum(losses) / len(own)), percent(max(losses)), f"{sum(ders) / len(own):.3f}"]
                lines.append([defense, name, *under, *figures])
    heads = ["defense", "clean images", "ASR at most 5 %", "10 %", "15 %"]
    return markdown_table([*heads, "mean loss (points)", "greatest loss", "mean DER"], lines, names=2)


def _verdicts(grid: Sequence[Record]) -> str:
    judged = [r for r in grid if r.get("verdict") and "error" not in r]
    lines = []
    for defense in _defenses(judged):
        own = [r for r in judged if r["defense"]["name"] == defense]
        attacked = [r for r in own if r["attack"]["kind"] != "none" and (r["before"]["asr"] or 0) >= KEPT]
        said = {
            status: [r["after"]["asr"] for r in attacked if r["verdict"]["status"] == status]
            for status in ("removed", "reduced", "not removed", "nothing found")
        }
        suspected = [r for r in attacked if r["verdict"]["targets"]]
        pairs = [(r["verdict"]["residual_after"], r["after"]["asr"]) for r in suspected]
        clean = [r for r in own if r["attack"]["kind"] == "none"]
        lines.append(
            [
                defense,
                f"{len(said['removed'])} ({sum(asr > WRONGLY_REMOVED for asr in said['removed'])})",
                str(len(said["reduced"])),
                f"{len(said['not removed'])} ({sum(asr < WRONGLY_KEPT for asr in said['not removed'])})",
                str(len(said["nothing found"])),
                f"{rank_correlation(pairs):.2f}" if len(pairs) > 2 else DASH,
                _share(clean, lambda r: r["verdict"]["status"] == "nothing found"),
            ]
        )
    heads = ["defense", "removed (wrong)", "reduced", "not removed (wrong)", "nothing found", "rank correlation"]
    return markdown_table([*heads, "of the clean networks, nothing found"], lines, names=1)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's, with mean ranks where values are equal; NaN where all are."""
    ranks = []
    for values in zip(*pairs, strict=True):
        order = sorted(values)
        ranks.append([order.index(value) + order.count(value) / 2 for value in values])
    return float("nan") if any(len(set(column)) < 2 for column in ranks) else correlation(*ranks)


def _cases(grid: Sequence[Record], split: str) -> str:
    runs = [r for r in grid if r["split"] == split]
    defenses = _defenses(runs)
    rows: dict[str, list[Record]] = {}
    for record in runs:
        rows.setdefault(_case(record), []).append(record)
    lines = []
    for group in rows.values():
        found = {record["defense"]["name"]: record for record in group}
        first = group[0]
        before = next((r["before"] for r in group if "before" in r), {"asr": None, "acc": None})
        options = first["attack"]["options"]
        rate = f", {100 * options['poison_rate']:g} %" if options else ""
        names = [first["network"]["name"], first["data"], attack_of(first) + rate, first["clean"]["name"]]
        lines.append([*names, percent(before["asr"]), percent(before["acc"]), *(_cell(found.get(d)) for d in defenses)])
    heads = ["network", "data", "attack", "clean", "ASR", "ACC", *defenses]
    return markdown_table(heads, sorted(lines), names=4)


def _errors(grid: Sequence[Record]) -> str:
    failed = [r for r in grid if "error" in r]
    said = Counter((r["defense"]["name"], r["error"]["type"], r["error"]["message"]) for r in failed)
    return "\n".join(
        f"* {defense} ({count}): {kind}: {message}" for (defense, kind, message), count in sorted(said.items())
    )


def _defenses(records: Iterable[Record]) -> list[str]:
    return sorted({r["defense"]["name"] for r in records if r["defense"]["kind"] != "none"})


def _share(records: Sequence[Record], sound: Callable[[Record], bool]) -> str:
    return f"{sum(map(sound, records))} of {len(records)}"


def _damaged(records: Sequence[Record]) -> str:
    at_chance = sum(record["after"]["acc"] < CHANCE for record in records)
    return f"{_share(records, lambda r: loss_of(r) > LOST)} ({at_chance})"


def _cell(record: Record | None) -> str:
    if record is None:
        return DASH
    return "error" if "error" in record else f"{percent(record['after']['asr'])} ({percent(loss_of(record))})"


if __name__ == "__main__":
    main()
