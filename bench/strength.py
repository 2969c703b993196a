"""What a method does with the strength that it chooses from clean data, and with those that hindsight would try.

    .venv/bin/python bench/strength.py --method ft_sam --attack badnets --seed 0  # one network, appended to the results
    .venv/bin/python bench/strength.py --values 0.1 0.2 0.3  # and with these values of its strength
    .venv/bin/python bench/strength.py --table  # all recorded ones, as Markdown

The demo's network is purified in full with `bdfast.purify`, once with the strength left to the rule and once with each
of `values`. Hindsight looks at the triggered test set, the rule does not.
"""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import bdfast
from bdfast.defenses import METHODS
from bdfast.training import Probe

RESULTS = Path(__file__).parent / "results" / "strength.jsonl"


@dataclass(frozen=True)
class Study:
    """Attributes:
    method: What to purify with.
    attack: What to plant.
    seed: Of all randomness.
    values: Strengths to try beside the one that the rule chooses.
    networks: Folder that keeps the backdoored networks between calls; none when left out.
    table: Print what is recorded instead.
    """

    method: str = "tsbd"
    attack: str = "badnets"
    seed: int = 0
    values: tuple[float, ...] = ()
    networks: Path | None = None
    table: bool = False


def scenario_of(attack: str, seed: int, networks: Path | None) -> bdfast.Scenario:
    """The demo's network and data; the network from `networks`, where it lies there."""
    weights = networks and networks / f"{attack}-{seed}.safetensors"
    return bdfast.backdoored(attack, seed=seed, weights=weights)


def main() -> None:
    study = tyro.cli(Study, description=__doc__)
    if study.table:
        print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))
        return
    scenario = scenario_of(study.attack, study.seed, study.networks)
    model = scenario.model
    evaluator = bdfast.Evaluator(scenario.test, scenario.triggered)
    before = evaluator(model)
    print(before)
    option = getattr(METHODS[study.method], "strength", "")

    def purified(**options: float) -> dict[str, Any]:
        result = bdfast.purify(model, scenario.clean, method=study.method, seed=study.seed, progress=True, **options)
        row = {"value": result.options.get(option), **evaluator(result.model, baseline=before).as_dict()}
        probes = {probe.value: probe.accuracy for probe in result.history if isinstance(probe, Probe)}
        print(row, flush=True)
        return {**row, "probes": probes, "found": result.found, "seconds": result.seconds, "options": result.options}

    record = {
        "method": study.method,
        "attack": study.attack,
        "seed": study.seed,
        "before": before.as_dict(),
        "rule": purified(),
        "hindsight": [purified(**{option: value}) for value in study.values],
        "commit": commit(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")


def commit() -> str:
    describe = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()


def table(records: list[dict]) -> str:
    """The newest record of every method and network: before, with the rule's choice, and the best in hindsight."""
    newest = {(record["method"], record["attack"], record["seed"]): record for record in records}
    lines = [
        "| method | attack, seed | before ACC / ASR | chosen | ACC | ASR | RA | DER | hindsight: best DER, at |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, attack, seed), record in sorted(newest.items()):
        rule, before = record["rule"], record["before"]
        cells = [
            method,
            f"{attack}, {seed}",
            f"{percent(before['acc'])} / {percent(before['asr'])}",
            f"{rule['value']:g}" if rule["value"] is not None else "",
            f"{percent(rule['acc'])} ({100 * (rule['acc'] - before['acc']):+.2f})",
            percent(rule["asr"]),
            percent(rule["ra"]),
            f"{rule['der']:.3f}",
        ]
        best = max([rule, *record["hindsight"]], key=lambda row: row["der"])
        cells.append(f"{best['der']:.3f}, {best['value']:g}" if record["hindsight"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


if __name__ == "__main__":
    main()
