"""Training on poisoned data: what ABL and CBD keep of the attack and of the accuracy, and what isolation takes.

    python -m bench.suppression run                  # the whole training set, with the defaults of the methods
    python -m bench.suppression run --images 6000 --stages 5 7 --methods abl
    python -m bench.suppression isolation            # whole batches against one sample at a time
    python -m bench.suppression table

`run` appends to the results what they do not have yet. The network is that of the demo. Plain training on the poisoned
images and on the same images without poison, for as many epochs as the method has, says what to compare with.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import tyro

import bdfast
from bdfast.data.batches import Batches
from bdfast.evaluation import Metrics
from bdfast.matrix.tables import markdown_table
from bdfast.scenario import Plan, plan, untrained
from bdfast.suppression.sample_losses import losses_of
from bdfast.suppression.suppressing import suppress
from bdfast.task import default_forward
from bdfast.training import fit
from bdfast.training.seeds import derived_seed

RESULTS = Path(__file__).parent / "results" / "suppression.jsonl"
EPOCHS = {"abl": ("isolation_epochs", "epochs"), "cbd": ("backdoor_epochs", "epochs")}
Row = dict[str, Any]


def recorded() -> list[Row]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def append(row: Row) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def run(
    attacks: tuple[str, ...] = ("badnets", "blended"),
    methods: tuple[str, ...] = ("abl", "cbd"),
    images: int | None = None,
    stages: tuple[int, int] | None = None,
    batch_size: int = 128,
    seeds: tuple[int, ...] = (0,),
    data: str = "fashion-mnist",
    threads: int = 1,
) -> None:
    """Train with every method on data poisoned by every attack at 10 %.

    Args:
        attacks: Names of attacks.
        methods: Names of methods.
        images: Training images; all when left out.
        stages: Epochs of the first network or stage, and of the second; those of the method when left out.
        batch_size: Of all trainings.
        seeds: Of all chance.
        data: Name of the data.
        threads: Of torch.
    """
    torch.set_num_threads(threads)
    for seed in seeds:
        for attack in attacks:
            planned = plan(attack, seed=seed, data=data)
            count = len(planned.attacker) if images is None else images
            for method in methods:
                case: Row = {"kind": "training", "attack": attack, "method": method, "images": count, "seed": seed}
                case |= {"data": data, "batch_size": batch_size, "stages": list(stages) if stages else None}
                if not any(case.items() <= row.items() for row in recorded()):
                    append({**case, **trained(planned, case), "threads": threads, "torch": torch.__version__})
    table()


def trained(planned: Plan, case: Row) -> Row:
    """The method, and plain training with and without poison for as many epochs."""
    seed, method, size = case["seed"], case["method"], case["batch_size"]
    attacker = planned.attacker.subset(torch.arange(case["images"]))
    poisoned = bdfast.poisoned(attacker, planned.attack, seed=derived_seed(seed, "poison"))
    evaluate = bdfast.Evaluator(planned.test, planned.triggered)
    options = dict(zip(EPOCHS[method], case["stages"], strict=True)) if case["stages"] else {}
    result = suppress(
        untrained(planned.spec, seed=seed),
        poisoned,
        method=method,
        seed=seed,
        batch_size=size,
        truth=poisoned.poison_indices,  # type: ignore[union-attr]
        **options,
    )
    epochs = sum(result.options[name] for name in EPOCHS[method])
    figures: dict[str, Metrics] = {method: evaluate(result.model)}
    for name, images in (("poisoned", poisoned), ("clean", attacker)):
        model = untrained(planned.spec, seed=seed)
        fit(model, images, epochs=epochs, batch_size=size, seed=seed)
        figures[name] = evaluate(model)
    return {
        "result": figures[method].as_dict(),
        "poisoned": figures["poisoned"].as_dict(),
        "clean": figures["clean"].as_dict(),
        "precision": result.precision,
        "options": result.options,
        "found": result.found,
        "warnings": result.warnings,
        "seconds": result.seconds,
        "updates": result.updates,
    }


def isolation(images: int = 2000, batch_size: int = 128, threads: int = 1, data: str = "fashion-mnist") -> None:
    """Seconds of the pass that finds the loss of every sample, in whole batches and one sample at a time."""
    torch.set_num_threads(threads)
    planned = plan("badnets", data=data)
    model = untrained(planned.spec).eval()
    attacker = planned.attacker.subset(torch.arange(images))
    seconds: dict[int, list[float]] = {batch_size: [], 1: []}
    for _ in range(3):
        for size, taken in seconds.items():
            batches = Batches(attacker, device=next(model.parameters()).device, batch_size=size)
            started = perf_counter()
            losses_of(model, batches, default_forward)
            taken.append(perf_counter() - started)
    batched, single = (min(seconds[size]) for size in (batch_size, 1))
    row = {"kind": "isolation", "images": images, "batch_size": batch_size, "data": data, "threads": threads}
    append({**row, "batched": batched, "single": single, "torch": torch.__version__})
    times = f"{batched:.2f} s in batches of {batch_size}, {single:.2f} s one by one"
    print(f"{images} images: {times}, {single / batched:.1f} times as long")


def table() -> None:
    """Print what is recorded."""
    lines = []
    for row in recorded():
        if row["kind"] != "training":
            continue
        found = [row["result"][key] for key in ("acc", "asr")]
        plain = [row["poisoned"]["acc"], row["poisoned"]["asr"], row["clean"]["acc"]]
        epochs = [str(row["options"][name]) for name in EPOCHS[row["method"]]]
        lines.append(
            [
                row["method"],
                row["attack"],
                str(row["images"]),
                " + ".join(epochs),
                f"{100 * row['precision']:.0f}",
                *(f"{100 * value:.1f}" for value in (*found, *plain)),
                f"{row['seconds']:.0f}",
            ]
        )
    heads = [
        "method",
        "attack",
        "images",
        "epochs",
        "poisoned among the suspected (%)",
        "ACC",
        "ASR",
        "ACC, plain",
        "ASR, plain",
        "ACC, plain without poison",
        "seconds",
    ]
    print(markdown_table(heads, lines, names=2))


if __name__ == "__main__":
    commands = {"run": run, "isolation": isolation, "table": table}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
