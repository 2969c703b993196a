"""What the methods do that were given no images."""

from __future__ import annotations

from collections.abc import Sequence

from bdfast.matrix.tables import Record, markdown_table
from bench.record_facts import attack_of, loss_of, percent


def data_free_table(records: Sequence[Record]) -> str:
    """ASR and loss of ACC, case by case, and their means; empty where nothing was measured."""
    rows = [r for r in records if r["clean"]["name"] == "none" and r["defense"]["kind"] != "none" and "after" in r]
    kinds = sorted({record["defense"]["kind"] for record in rows})
    cases: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in rows:
        key = (record["network"]["name"], record["data"], attack_of(record))
        cases.setdefault(key, {})[record["defense"]["kind"]] = record
    lines = []
    for names, found in sorted(cases.items()):
        before = next(iter(found.values()))["before"]["asr"]
        figures = [
            f"{percent(found[k]['after']['asr'])} ({percent(loss_of(found[k]))})" if k in found else "" for k in kinds
        ]
        lines.append([*names, percent(before), *figures])
    means = []
    for kind in kinds:
        own = [record for record in rows if record["defense"]["kind"] == kind]
        asr, loss = (sum(values) / len(own) for values in ([r["after"]["asr"] for r in own], [loss_of(r) for r in own]))
        means.append(f"{percent(asr)} ({percent(loss)})")
    if not rows:
        return ""
    mean_before = sum(next(iter(found.values()))["before"]["asr"] for found in cases.values()) / len(cases)
    lines.append(["mean", "", "", percent(mean_before), *means])
    return markdown_table(["network", "data", "attack", "ASR before (%)", *kinds], lines, names=3)
