"""What the rule makes of recorded stages, beside the best stage in hindsight: a Markdown table.

    python -m bench.stages_table bench/results/stages.jsonl

The rows are those of `bench.stages`; the rule is that of `bdfast.selection`, with the accuracy and the residual that
stand in them. Regret is the DER of the best stage, or of doing nothing, less that of the stage which the rule takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import tyro
from torch import nn

from bdfast.defenses import METHODS
from bdfast.defenses.verdict import REMOVED
from bdfast.matrix.tables import markdown_table
from bdfast.selection import climb
from bdfast.training import Run
from bench.results_page import rank_correlation

Row = dict[str, Any]


def main(file: tyro.conf.Positional[Path]) -> None:
    """Print the table."""
    runs: dict[str, dict[str, list[Row]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "acc" in row:
            options = ", ".join(f"{key} {value}" for key, value in row["options"].items() if value is not None)
            case = json.dumps([row[key] for key in ("network", "data", "attack", "clean", "seed")])
            runs.setdefault(f"{row['method']} {options}".strip(), {}).setdefault(case, []).append(row)
    lines = [[name, *_line(name.split()[0], cases)] for name, cases in runs.items()]
    heads = ["method and options", "cases", "median ASR (%)", "ASR of 15 % or less", "mean loss of ACC (points)"]
    heads += ['"removed" above 15 %', "mean regret", "worst regret", "search in all seconds (%)"]
    print(markdown_table(heads, lines, names=1))
    every = [row for cases in runs.values() for rows in cases.values() for row in rows[1:]]
    pairs = [(row["residual"], row["asr"]) for row in every if row["targets"] and row["asr"] is not None]
    print(f"\nRank correlation of residual and ASR over {len(pairs)} stages: {rank_correlation(pairs):.2f}")


def _line(method: str, cases: dict[str, list[Row]]) -> list[str]:
    taken = [(rows, by_the_rule(method, rows)) for rows in cases.values() if rows[0]["asr"] and rows[0]["asr"] > 0.4]
    asr = sorted(row["asr"] for _, row in taken)
    regrets = [max(_der(rows[0], row) for row in rows) - _der(rows[0], choice) for rows, choice in taken]
    losses = [rows[0]["acc"] - choice["acc"] for rows, choice in taken]
    wrong = sum(bool(c["targets"]) and c["residual"] <= REMOVED and c["asr"] > 0.15 for _, c in taken)
    return [
        str(len(taken)),
        f"{100 * asr[len(asr) // 2]:.1f}",
        f"{sum(value <= 0.15 for value in asr)} of {len(asr)}",
        f"{100 * mean(losses):.1f}",
        str(wrong),
        f"{mean(regrets):.3f}",
        f"{max(regrets):.3f}",
        f"{100 * median(_searching(rows, choice) for rows, choice in taken):.0f}",
    ]


def _searching(rows: list[Row], choice: Row) -> float:
    """The share of the search for surrogates in the time up to the stage that is taken, the first where none is."""
    last = max(1, rows.index(choice))
    return float(rows[0]["seconds"] / sum(row["seconds"] for row in rows[: last + 1]))


class Replay:
    """What `climb` asks of a judge and a model, answered from the rows of a run; the first is the given network."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = {row["rate"]: row for row in rows}
        self.before = self.reached(None)
        self.targets = rows[0]["targets"]
        self.clear = rows[0].get("clear", bool(self.targets))

    def reached(self, rate: float | None) -> SimpleNamespace:
        row = self.rows[rate]
        return SimpleNamespace(residual=row["residual"], accuracy=row["held_out_acc"], floor=row["floor"])

    def train(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, model: Any) -> SimpleNamespace:
        return self.reached(self.rate)

    def floor(self, reached: SimpleNamespace, max_accuracy_drop: float) -> float:
        return float(reached.floor - max_accuracy_drop)  # recorded with a budget of zero

    def warnings(self, reached: SimpleNamespace, max_accuracy_drop: float) -> list[str]:
        return []


def by_the_rule(method: str, rows: list[Row]) -> Row:
    """The row of the stage that `bdfast.selection.climb` takes; the first row is the given network."""
    replay = Replay(rows)
    ladder = [row["rate"] for row in rows[1:]]
    ladder = ladder if replay.clear else ladder[: METHODS[method].unsuspected]
    model = nn.Identity()
    choice = climb(ladder, replay.train, model, replay, Run(), max_accuracy_drop=METHODS[method].max_accuracy_drop)
    return replay.rows[choice.strength]


def _der(given: Row, row: Row) -> float:
    return float(max(0.0, given["asr"] - row["asr"]) - max(0.0, given["acc"] - row["acc"]) + 1) / 2


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
