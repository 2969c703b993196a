"""One whole TSBD purification, ours and a plain transcription of the published loop, on the demo's network in one run.

    .venv/bin/python -m bench.whole_tsbd --attack badnets --seed 0  # about four minutes; appended to the results

Same network, images, augmentation, loss, learning rates, epochs and n; what differs is how it is done. The published
way computes in float32 in the default memory format, keeps changes and gradients in Python lists, copies the model in
every step, and makes a third pass for the BatchNorm statistics. Both are then evaluated on triggered images.
"""

from __future__ import annotations

import copy
import json
import math
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
from bench.strength import commit, scenario_of

RESULTS = Path(__file__).parent / "results" / "whole_tsbd.jsonl"
N, M = 0.3, 0.7
DEFENSE = bdfast.TSBDDefense(n=N, m=M)


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


def fine_tuned(model: nn.Module, given: nn.Module, data: Batches, run: Run, clock: Clock) -> nn.Module:
    augment = bdfast.Augmentation()
    loss = DistillationLoss(run, teacher=given, distill=DEFENSE.distill, overlay=DEFENSE.overlay)
    optimizer = torch.optim.SGD(model.parameters(), lr=DEFENSE.lr, momentum=DEFENSE.momentum)
    for epoch in range(DEFENSE.epochs):
        optimizer.param_groups[0]["lr"] = DEFENSE.lr * (1 + math.cos(math.pi * epoch / DEFENSE.epochs)) / 2
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
    scenario = scenario_of(study.attack, study.seed, study.networks)
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
    record = {
        "attack": study.attack,
        "seed": study.seed,
        "before": before.as_dict(),
        **{name: {**row, "parts": dict(clocks[name].seconds)} for name, row in rows.items()},
        "share": rows["ours"]["seconds"] / rows["published"]["seconds"],
        "commit": commit(),
        "machine": f"{torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
