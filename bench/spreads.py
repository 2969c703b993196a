"""What differs between seeds: the strength of the attacks, and what the default method leaves of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from bdfast.matrix.tables import Record, markdown_table
from bench.record_facts import attack_of, loss_of, spread


def attacks_table(records: Sequence[Record]) -> str:
    """ASR and ACC of the backdoored networks, and what they lose to a clean one of the same seed."""
    trained = {r["network_digest"]: r for r in records if r["defense"]["kind"] == "none" and "before" in r}
    twins = {_twin(r): r["before"]["acc"] for r in trained.values() if r["attack"]["kind"] == "none"}
    rows: dict[tuple[str, ...], list[Record]] = {}
    for record in trained.values():
        if record["attack"]["kind"] != "none":
            rate = f"{100 * record['attack']['options']['poison_rate']:g} %"
            rows.setdefault((record["network"]["name"], record["data"], attack_of(record), rate), []).append(record)
    lines = []
    for names, group in sorted(rows.items()):
        losses = [twins[_twin(r)] - r["before"]["acc"] for r in group if _twin(r) in twins]
        figures = [spread([r["before"][key] for r in group]) for key in ("asr", "acc")]
        lines.append([*names, *figures, spread(losses), str(len(group))])
    heads = ["network", "data", "attack", "poison rate", "ASR (%)", "ACC (%)", "ACC lost (points)", "seeds"]
    return markdown_table(heads, lines, names=4)


def _twin(record: Record) -> str:
    return json.dumps([record["network"], record["data"], record["seed"]], sort_keys=True)


def seeds_table(records: Sequence[Record]) -> str:
    """ASR before and after, loss of ACC and verdicts of each case and defense."""
    rows: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record["defense"]["kind"] != "none" and "after" in record:
            key = (attack_of(record), record["clean"]["name"], record["defense"]["name"])
            rows.setdefault(key, []).append(record)
    lines = []
    for names, group in sorted(rows.items()):
        said = Counter(record["verdict"]["status"] for record in group if record.get("verdict"))
        figures = [spread([record[when]["asr"] for record in group]) for when in ("before", "after")]
        verdicts = ", ".join(f"{status} {count}" for status, count in sorted(said.items()))
        lines.append([*names, *figures, spread([loss_of(record) for record in group]), verdicts, str(len(group))])
    heads = ["attack", "clean", "defense", "ASR before (%)", "ASR after (%)", "ACC lost (points)", "verdicts", "seeds"]
    return markdown_table(heads, lines, names=3)
