"""The demo's purification under other seeds, thread counts, precisions and instruction sets: does it hang on rounding?

    python -m bench.robustness run --networks networks  # trains what is not there, appends to the results
    python -m bench.robustness table

Each purification is a process of its own, with the default method and nothing else set. `avx2` takes away what a newer
processor has (ONEDNN_MAX_CPU_ISA=AVX2, ATEN_CPU_CAPABILITY=avx2).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import tyro

import bdfast
from bdfast.matrix.tables import DASH, markdown_table

RESULTS = Path(__file__).parent / "results" / "robustness.jsonl"
VARIANTS = {
    "1 thread, bfloat16": (1, True, {}),
    "1 thread, float32": (1, False, {}),
    "2 threads, bfloat16": (2, True, {}),
    "1 thread, float32, avx2": (1, False, {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}),
}


def run(
    networks: Path,
    attacks: tuple[str, ...] = ("badnets", "blended"),
    seeds: tuple[int, ...] = (0, 1, 2),
    variants: tuple[str, ...] = tuple(VARIANTS),
) -> None:
    """Purify every network in every variant that has no record yet."""
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {(row["attack"], row["seed"], row["variant"]) for row in known}
    for seed in seeds:
        for attack in attacks:
            for variant in variants:
                if (attack, seed, variant) not in done:
                    threads, amp, environment = VARIANTS[variant]
                    arguments = ["one", attack, str(seed), variant, str(threads), str(int(amp)), str(networks)]
                    here = {**os.environ, **environment, "OMP_NUM_THREADS": str(threads)}
                    subprocess.run([sys.executable, "-m", "bench.robustness", *arguments], env=here, check=True)


def one(attack: str, seed: int, variant: str, threads: int, amp: bool, networks: Path) -> None:
    torch.set_num_threads(threads)
    networks.mkdir(parents=True, exist_ok=True)
    scenario = bdfast.backdoored(attack, seed=seed, weights=networks / f"{attack}-{seed}.safetensors")
    evaluator = bdfast.Evaluator(scenario.test, scenario.triggered)
    before = evaluator(scenario.model)
    result = bdfast.purify(scenario.model, scenario.clean, seed=seed, amp=amp)
    after = evaluator(result.model, baseline=before)
    row = {
        "attack": attack,
        "seed": seed,
        "variant": variant,
        "before": before.as_dict(),
        "after": after.as_dict(),
        "verdict": str(result.verdict),
        "seconds": result.seconds,
        "torch": torch.__version__,
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def table() -> None:
    """Print what is recorded."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    lines = []
    for attack, seed in sorted({(row["attack"], row["seed"]) for row in rows}):
        own = {row["variant"]: row for row in rows if (row["attack"], row["seed"]) == (attack, seed)}
        first = next(iter(own.values()))["before"]
        cells = [
            f"{100 * own[name]['after']['asr']:.1f} ({100 * (first['acc'] - own[name]['after']['acc']):.1f})"
            if name in own
            else DASH
            for name in VARIANTS
        ]
        lines.append([f"{attack}, {seed}", f"{100 * first['acc']:.1f}", f"{100 * first['asr']:.1f}", *cells])
    print(markdown_table(["attack, seed", "ACC", "ASR", *VARIANTS], lines, names=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        attack, seed, variant, threads, amp, networks = sys.argv[2:]
        one(attack, int(seed), variant, int(threads), bool(int(amp)), Path(networks))
    else:
        tyro.extras.subcommand_cli_from_dict({"run": run, "table": table}, description=__doc__)
