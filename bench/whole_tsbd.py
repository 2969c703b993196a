"""One whole TSBD purification, ours and a plain transcription of the published loop, on the demo's network in one run.

    .venv/bin/python -m bench.whole_tsbd --attack badnets --seed 0  # about six minutes; appended to the results

Same network, images, augmentation, loss, learning rates, epochs and n; what differs is how it is done. The published
way computes in float32 in the default memory format, keeps changes and gradients in Python lists, copies the model in
every step, and makes a third pass for the BatchNorm statistics. Both are then evaluated on triggered images.

Beside them, the default method with everything that it chooses itself, and what the published script takes in all: it
unlearns once, then tries eleven values of n with 21 epochs and an evaluation each. Of these it runs one here, of
`EPOCHS` epochs; the rest is in proportion.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import tyro
from torch import nn
from torch.nn import functional as F

import bdfast
from bdfast.data.batches import Batches
from bdfast.defenses.distillation import DistillationLoss
from bdfast.optim import SharpOptimizer
from bdfast.training import Epoch, Run
from bdfast.training.loop import RECENT
from bdfast.training.seeds import derived_seed, seeded

RESULTS = Path(__file__).parent / "results" / "whole_tsbd.jsonl"
N, M = 0.3, 0.7
EPOCHS = 12
DEFENSE = bdfast.TSBDDefense(n=N, m=M, lr=0.03, epochs=EPOCHS)
PUBLISHED_VALUES, PUBLISHED_EPOCHS = 11, 21
"""Values of n that the published script tries, and the epochs of each."""


@dataclass(frozen=True)
class Study:
    """Attributes:
    attack: What to plant.
    seed: Of all randomness.
    networks: Folder that keeps the backdoored networks between calls; none when left out.
    """

    attack: str = "badnets"
    seed: int = 0
    networks: Path | None = None


def commit() -> str:
    describe = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self.seconds[part] += perf_counter() - started


def published(model: nn.Module, data: Batches, steps: int, seed: int, clock: Clock) -> nn.Module:
    """The loop as the published code writes it; `steps` of unlearning, as many as ours took."""
    run = Run(seed=seed, amp=False)
    augment = bdfast.Augmentation()
    unlearned = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(unlearned.parameters(), lr=DEFENSE.unlearn_lr, momentum=DEFENSE.momentum)
    epoch = done = 0
    while done < steps:
        epoch += 1
        for images, labels in data.shuffled(derived_seed(seed, "unlearn", epoch)):
            if done == steps:
                break
            with clock("forward and backward"):
                optimizer.zero_grad()
                (-F.cross_entropy(unlearned(augment(images)), labels)).backward()
            with clock("steps"):
                optimizer.step()
            done += 1
    given = copy.deepcopy(model)
    with clock("ranking and zeroing"):
        zero(model, unlearned)
    return fine_tuned(model, given, data, run, clock)


def zero(model: nn.Module, unlearned: nn.Module) -> None:
    """Changes of every neuron in Python lists, ranked with `sorted`."""
    weights, changed = model.state_dict(), unlearned.state_dict()
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    rows = []
    for name in (name for name in names if "shortcut" not in name):
        for index in range(len(weights[name])):
            change = (changed[name][index] - weights[name][index]).abs().flatten()
            rows.append((name, index, change.sum().item(), change.tolist()))
    rows.sort(key=lambda row: -row[2])
    chosen = rows[: int(N * len(rows))]
    pool = sorted((value for row in chosen for value in row[3]), reverse=True)
    tau = pool[int(M * len(pool)) - 1]
    for name, index, _, change in chosen:
        flat = weights[name][index].reshape(-1)
        for place, value in enumerate(change):
            if value >= tau:
                flat[place] = 0.0
        weights[name][index] = flat.view_as(weights[name][index])
    model.load_state_dict(weights)


def fine_tuned(
    model: nn.Module,
    given: nn.Module,
    data: Batches,
    run: Run,
    clock: Clock,
    *,
    epochs: int = EPOCHS,
    distill: float = DEFENSE.distill,
) -> nn.Module:
    augment = bdfast.Augmentation()
    loss = DistillationLoss(run, teacher=given, distill=distill, overlay=DEFENSE.overlay)
    optimizer = torch.optim.SGD(model.parameters(), lr=DEFENSE.rate, momentum=DEFENSE.momentum)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = DEFENSE.rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        model.train()
        for images, labels in data.shuffled(derived_seed(run.seed, "fine-tune", epoch + 1)):
            with clock("forward and backward"):
                batch = loss.prepare((augment(images), labels))
            with clock("steps"):
                neighbour = copy.deepcopy(model)
            with clock("forward and backward"):
                neighbour.zero_grad()
                loss(neighbour, batch).loss.backward()
            with clock("steps"):
                first = [parameter.grad.clone() for parameter in neighbour.parameters()]
                with torch.no_grad():
                    for parameter, gradient in zip(neighbour.parameters(), first, strict=True):
                        norm = gradient.norm()
                        if norm > 0:  # the published code divides by zero here
                            parameter.add_(DEFENSE.rho * gradient / norm)
            with clock("forward and backward"):
                neighbour.zero_grad()
                loss(neighbour, batch).loss.backward()
            with clock("steps"):
                second = [parameter.grad.clone() for parameter in neighbour.parameters()]
                mixed = [(1 - DEFENSE.alpha) * a + DEFENSE.alpha * b for a, b in zip(first, second, strict=True)]
                for parameter, gradient in zip(model.parameters(), mixed, strict=True):
                    parameter.grad = gradient
                optimizer.step()
            with clock("forward and backward"), torch.no_grad():
                model(batch.batch[0])
    return model


def published_whole(model: nn.Module, data: Batches, evaluator: bdfast.Evaluator, unlearned_and_tuned: float) -> float:
    """Seconds of the whole published script, in proportion: fine-tuning for two epochs without a teacher, and an
    evaluation. Its unlearning takes more steps than ours, which are counted here."""
    started = perf_counter()
    evaluator(model)
    evaluation = perf_counter() - started
    trial, clock = copy.deepcopy(model), Clock()
    with seeded(0, torch.device("cpu")):
        started = perf_counter()
        fine_tuned(trial, model, data, Run(amp=False), clock, epochs=2, distill=0.0)
        epoch = (perf_counter() - started) / 2
    unlearning = max(0.0, unlearned_and_tuned - EPOCHS * epoch)
    return unlearning + PUBLISHED_VALUES * (PUBLISHED_EPOCHS * epoch + evaluation)


def ours(model: nn.Module, clean: object, seed: int, clock: Clock) -> bdfast.PurifyResult:
    originals = {name: getattr(SharpOptimizer, name) for name in ("first_step", "_finish")}

    def timed(name: str):
        def call(self, *args, **kwargs):
            with clock("steps"):
                return originals[name](self, *args, **kwargs)

        return call

    for name in originals:
        setattr(SharpOptimizer, name, timed(name))
    try:
        return bdfast.purify(model, clean, method=DEFENSE, seed=seed)
    finally:
        for name, original in originals.items():
            setattr(SharpOptimizer, name, original)


def main() -> None:
    study = tyro.cli(Study, description=__doc__)
    weights = study.networks and study.networks / f"{study.attack}-{study.seed}.safetensors"
    scenario = bdfast.backdoored(study.attack, seed=study.seed, weights=weights)
    model = scenario.model
    evaluator = bdfast.Evaluator(scenario.test, scenario.triggered)
    before = evaluator(model)
    data = Batches(scenario.clean, device="cpu")
    clocks = {"ours": Clock(), "published": Clock()}
    rows = {}
    started = perf_counter()
    result = ours(model, scenario.clean, study.seed, clocks["ours"])
    rows["ours"] = {"seconds": perf_counter() - started, **evaluator(result.model, baseline=before).as_dict()}
    unlearning = [row for row in result.history if isinstance(row, Epoch) and row.stage == "unlearn"]
    per_epoch = -(-len(data) // data.batch_size)
    # Our last epoch ends within; ours counts at least the batches that it is judged by.
    steps = max(RECENT, round((len(unlearning) - 0.5) * per_epoch))
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    started = perf_counter()
    with seeded(study.seed, torch.device("cpu")):
        purified = published(plain, data, steps, study.seed, clocks["published"])
    rows["published"] = {"seconds": perf_counter() - started, **evaluator(purified, baseline=before).as_dict()}
    started = perf_counter()
    default = bdfast.purify(model, scenario.clean, seed=study.seed)
    default_seconds = perf_counter() - started
    whole = published_whole(plain, data, evaluator, rows["published"]["seconds"])
    record = {
        "attack": study.attack,
        "seed": study.seed,
        "before": before.as_dict(),
        **{name: {**row, "parts": dict(clocks[name].seconds)} for name, row in rows.items()},
        "share": rows["ours"]["seconds"] / rows["published"]["seconds"],
        "default": {
            "method": default.method,
            "seconds": default_seconds,
            "updates": default.updates,
            "verdict": str(default.verdict),
            **evaluator(default.model, baseline=before).as_dict(),
        },
        "published_whole_seconds": whole,
        "default_share": default_seconds / whole,
        "commit": commit(),
        "machine": f"{torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
