"""A hundred and a thousand classes: is the target label found, is the backdoor removed, and what does the search cost?

    python -m bench.many_classes run --networks networks  # trains what is not there, appends to the results
    python -m bench.many_classes table

A class is a tuple of garments: two images of Fashion-MNIST side by side are one of 100 classes, three one of 1,000. The
network is that of the demo, its trigger BadNets', its target label `TARGET`; the defender has 5 % of the images.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

import torch
import tyro

import bdfast
from bdfast.data.images import ImageTensors
from bdfast.data.sources import load_source
from bdfast.matrix.tables import markdown_table

RESULTS = Path(__file__).parent / "results" / "many_classes.jsonl"
TARGET = 42
EPOCHS = 6


def tuples(garments: int) -> bdfast.DataSource:
    """As many images as Fashion-MNIST has, of garments drawn from it."""
    source = load_source("fashion-mnist")
    draws = torch.Generator().manual_seed(garments)

    def beside(images: ImageTensors) -> ImageTensors:
        drawn = torch.randint(len(images), (garments, len(images)), generator=draws)
        labels = sum(images.labels[row] * 10**place for place, row in enumerate(drawn))
        return ImageTensors(torch.cat([images.images[row] for row in drawn], dim=3), labels)

    train, test = beside(source.train), beside(source.test)
    return bdfast.DataSource(f"{garments} garments", train, test, source.message, epochs=EPOCHS)


bdfast.register_data("garments-2", lambda: tuples(2))
bdfast.register_data("garments-3", lambda: tuples(3))


def run(networks: Path, garments: tuple[int, ...] = (2, 3), seed: int = 0, threads: int = 1) -> None:
    """Search and purify, one network after the other."""
    torch.set_num_threads(threads)
    networks.mkdir(parents=True, exist_ok=True)
    for count in garments:
        weights = networks / f"garments-{count}-{seed}.safetensors"
        scenario = bdfast.backdoored(
            bdfast.BadNets(target=TARGET), data=f"garments-{count}", seed=seed, weights=weights
        )
        evaluate = bdfast.Evaluator(scenario.test, scenario.triggered)
        before = evaluate(scenario.model)
        started = perf_counter()
        found = bdfast.surrogates(scenario.model, scenario.clean, seed=seed)
        searching = perf_counter() - started
        result = bdfast.purify(scenario.model, scenario.clean, seed=seed)
        row = {
            "classes": 10**count,
            "seed": seed,
            "threads": threads,
            "before": before.as_dict(),
            "after": evaluate(result.model, baseline=before).as_dict(),
            "targets": found.targets,
            "verdict": str(result.verdict),
            "seconds": {"searching": searching, "purifying": result.seconds},
            "torch": torch.__version__,
        }
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def table() -> None:
    """Print what is recorded."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    lines = [
        [
            str(row["classes"]),
            *(f"{100 * row[when][key]:.1f}" for when in ("before", "after") for key in ("acc", "asr")),
            ", ".join(map(str, row["targets"])) or "none",
            f"{row['seconds']['searching']:.0f}",
            f"{row['seconds']['purifying']:.0f}",
        ]
        for row in rows
    ]
    heads = [
        "classes",
        "ACC",
        "ASR",
        "ACC after",
        "ASR after",
        "suspects",
        "search (s)",
        "purification, search included (s)",
    ]
    print(markdown_table(heads, lines, names=1))


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"run": run, "table": table}, description=__doc__)
