"""What TSBD's clean-only choice of n costs, against the best n in hindsight.

    .venv/bin/python bench/tsbd_strength.py --attack badnets --seed 0      # one network, appended to the results
    .venv/bin/python bench/tsbd_strength.py --table                        # all recorded ones, as Markdown

The demo's network is purified in full for the n that the rule chose and for those of HINDSIGHT; the hindsight looks at
the triggered test set, the rule does not. Unlearning is done once, since it does not depend on n.
"""

from __future__ import annotations

import copy
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import nn

import bdfast
from bdfast.cli.demo import Scene, plant, set_up
from bdfast.cli.terminal import Output
from bdfast.data.batches import Batches
from bdfast.defenses import TSBD
from bdfast.io import load_into, save_weights
from bdfast.neurons import NeuronIndex
from bdfast.training import Run, seeded

HINDSIGHT = (0.1, 0.2, 0.3)
RESULTS = Path(__file__).parent / "results" / "tsbd_strength.jsonl"


@dataclass(frozen=True)
class Study:
    """Attributes:
    attack: What to plant.
    seed: Of all randomness.
    networks: Folder that keeps the backdoored networks between calls; none when left out.
    table: Print what is recorded instead.
    """

    attack: str = "badnets"
    seed: int = 0
    networks: Path | None = None
    table: bool = False


def backdoored(scene: Scene, study: Study) -> nn.Module:
    path = study.networks and study.networks / f"{study.attack}-{study.seed}.safetensors"
    if path and path.exists():
        return load_into(scene.spec.build(), path).to(memory_format=torch.channels_last).eval()
    model = plant(scene, study.seed, Output())
    if path:
        save_weights(model, path)
    return model


def main() -> None:
    study = tyro.cli(Study, description=__doc__)
    if study.table:
        print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))
        return
    scene = set_up(study.attack, study.seed, 0.05)
    model = backdoored(scene, study)
    judge = bdfast.Evaluator(scene.source.test, scene.triggered)
    before = judge(model)
    print(before)

    defense = TSBD()
    clean = Batches(scene.clean, device="cpu")
    run = Run(seed=study.seed, augment=bdfast.Augmentation())
    with seeded(study.seed, clean.device):
        unlearned = defense.unlearn(model, clean, run)
        scores = bdfast.neuron_weight_change(unlearned, model, index=NeuronIndex.in_scope(model))
        chosen = defense.choose_n(model, unlearned, scores, clean, run)
    probes = {row["n"]: row["accuracy"] for row in run.history if row["stage"] == "probe"}
    print("probes", probes, "chosen", chosen)
    rows = []
    for n in dict.fromkeys((chosen, *HINDSIGHT)):
        candidate = copy.deepcopy(model)
        bdfast.reinitialize(candidate, scores, n=n, m=defense.m, changed=(unlearned, model))
        with seeded(study.seed, clean.device):
            defense.fine_tune(candidate, model, clean, run, "fine-tune", defense.epochs)
        rows.append({"n": n, **judge(candidate, baseline=before).as_dict()})
        print(rows[-1], flush=True)
    record = {
        "attack": study.attack,
        "seed": study.seed,
        "before": before.as_dict(),
        "chosen": chosen,
        "probes": probes,
        "ladder": rows,
        "options": asdict(replace(defense, n=chosen)),
        "commit": commit(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")


def commit() -> str:
    describe = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()


def table(records: list[dict]) -> str:
    """The newest record of every network: before, the rule's choice, the best in hindsight, the loss of DER."""
    newest = {(record["attack"], record["seed"]): record for record in records}
    lines = [
        "| attack, seed | before ACC / ASR | rule: n, ACC / ASR, DER | hindsight: n, ACC / ASR, DER | loss of DER |",
        "|---|---|---|---|---|",
    ]
    losses = []
    for (attack, seed), record in sorted(newest.items()):
        by_n = {row["n"]: row for row in record["ladder"]}
        rule, best = by_n[record["chosen"]], max(record["ladder"], key=lambda row: row["der"])
        losses.append(best["der"] - rule["der"])
        cells = [f"{row['n']:g}: {percent(row)}, {row['der']:.3f}" for row in (rule, best)]
        lines.append(f"| {attack}, {seed} | {percent(record['before'])} | {' | '.join(cells)} | {losses[-1]:.3f} |")
    lines.append(f"| **mean** | | | | **{sum(losses) / len(losses):.3f}** |")
    return "\n".join(lines)


def percent(row: dict) -> str:
    return f"{row['acc']:.1%} / {row['asr']:.1%}".replace("%", " %")


if __name__ == "__main__":
    main()
