"""Every stage of every method on the cases of a grid: what the rule saw there, and what ASR and ACC were in truth.

    python -m bench.stages run bench/grids/development.yaml results --split tune --methods uau sau --file stages.jsonl
    python -m bench.stages pack bench/grids/development.yaml results --split tune --file tune.pt  # for another machine
    python -m bench.stages packed tune.pt --methods uau sau --file stages.jsonl --workers 12
    python -m bench.stages_table stages.jsonl

A method goes through all of its stages here; which of them the rule takes can be worked out from the rows, also under
other constants. `--set` gives options of the methods, as NAME=VALUE.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import tyro
from torch import nn

import bdfast
from bdfast.attacks import Triggered
from bdfast.data.images import ImageTensors
from bdfast.defenses import METHODS
from bdfast.evaluation import Evaluator
from bdfast.inversion.scene import scene_of
from bdfast.matrix.feasibility import check_grid, clean_positions
from bdfast.matrix.grid import read_grid
from bdfast.matrix.images_by_name import load_data
from bdfast.matrix.networks import NetworkStore, training_of
from bdfast.models import ModelSpec
from bdfast.selection import Choice, Judge
from bdfast.training.budget import LEAST_BATCH

TESTED = 1000
"""Test images of a packed case; its standard error is below a point."""

CHUNK = 2
"""Methods that one task of a worker studies."""

RUINED = 0.2
"""Loss of held-out accuracy at which no further stage is tried."""


@dataclass(frozen=True, eq=False)
class Case:
    """A backdoored network with its clean images, and what judges it in truth."""

    name: dict[str, str]
    spec: str
    weights: dict[str, torch.Tensor]
    clean: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    triggered: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None

    def model(self) -> nn.Module:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = ModelSpec.from_json(self.spec).build()
        model.load_state_dict(self.weights)
        return model.eval().to(device)

    def evaluator(self, device: torch.device) -> Callable[[nn.Module], tuple[float, float | None]]:
        evaluate = Evaluator(ImageTensors(*self.test), device=device)

        def measure(model: nn.Module) -> tuple[float, float | None]:
            acc = evaluate(model).acc
            if self.triggered is None:
                return acc, None
            images, targets, _ = self.triggered
            return acc, Evaluator(ImageTensors(images, targets), device=device)(model).acc

        return measure


def cases(grid: Path, output: Path, split: str) -> Iterator[Case]:
    """The cases of a grid whose networks lie in the output folder."""
    read = read_grid(grid)
    facts = check_grid(read)
    store, seen = NetworkStore(output / "networks"), set()
    for cell in read.cells:
        training = training_of(cell, facts[cell.data])
        key = (training.digest, cell.clean.name)
        if cell.split != split or key in seen or not store.has(training.digest):
            continue
        seen.add(key)
        source = load_data(cell.data)
        trained = store.load(training)
        positions = clean_positions(cell, source, facts[cell.data])
        drawn = torch.randperm(len(source.test), generator=torch.Generator().manual_seed(0))[:TESTED]
        test = source.test.subset(drawn)
        triggered = None
        if trained.attack is not None:
            shown = Triggered(test, trained.attack)
            images, targets, labels = zip(*(shown[index] for index in range(len(shown))), strict=True)
            pixels = (torch.stack(images) * 255).round().to(torch.uint8)
            triggered = (pixels, torch.tensor(targets), torch.tensor(labels))
        clean = source.train.subset(positions)
        names = {"network": cell.network.name, "data": cell.data, "attack": cell.attack.name, "clean": cell.clean.name}
        weights = {key: x.cpu() for key, x in trained.model.state_dict().items()}
        yield Case(
            {**names, "split": split},
            training.spec.to_json(),
            weights,
            (clean.images, clean.labels),
            (test.images, test.labels),
            triggered,
        )


def watched(
    case: Case, method: str, options: dict[str, Any], kept: dict[tuple[str, int | None], Judge], seed: int
) -> list[dict[str, Any]]:
    """A row for the given model and for each stage."""
    torch.set_num_threads(1)
    model = case.model()
    device = next(model.parameters()).device
    measure = case.evaluator(device)
    rows: list[dict[str, Any]] = []

    def row(rate: float | None, model: nn.Module, judge: Judge, seconds: float) -> float:
        reached = judge(model)
        acc, asr = measure(model)
        lengths = [] if judge.surrogates is None else judge.surrogates.lengths.lengths.tolist()
        led: list[tuple[str, float]] = []
        if judge.surrogates is not None:
            with scene_of(model, judge.held_out, judge.run) as scene:
                led = [
                    (f"{trigger.kind} to {trigger.target}", rate)
                    for trigger, rate in zip(judge.surrogates.triggers, judge.surrogates.rates(scene), strict=True)
                ]
        rows.append(
            {
                **case.name,
                "method": method,
                "options": options,
                "seed": seed,
                "device": device.type,
                "rate": rate,
                "acc": acc,
                "asr": asr,
                "held_out_acc": reached.accuracy,
                "floor": judge.floor(reached, 0.0),
                "residual": reached.residual,
                "rates": led,
                "targets": judge.targets,
                "clear": judge.clear,
                "lengths": [x if x < float("inf") else None for x in lengths],
                "seconds": seconds,
            }
        )
        return reached.accuracy

    def climb(
        ladder: Sequence[float], train: Callable[[float], None], model: nn.Module, judge: Judge, *_: Any, **__: Any
    ) -> Choice:
        for rate in ladder:
            started = time.perf_counter()
            try:
                train(rate)
            except FloatingPointError:
                rows.append({**case.name, "method": method, "options": options, "rate": rate, "diverged": True})
                break
            if row(rate, model, judge, time.perf_counter() - started) < judge.before.accuracy - RUINED:
                break
        return Choice(ladder[0], judge.before)

    def judge_of(given: nn.Module, clean: Any, run: Any, *, target: int | None = None) -> Judge:
        key = (json.dumps([case.name, seed]), target)
        if key not in kept:
            started = time.perf_counter()
            kept.clear()
            kept[key] = Judge(given, clean, run, target=target)
            kept[key].seconds = time.perf_counter() - started  # type: ignore[attr-defined]
        row(None, given, kept[key], kept[key].seconds)  # type: ignore[attr-defined]
        return kept[key]

    options = dict(options)
    rates = options.pop("rates", None)
    least_batch = options.pop("least_batch", LEAST_BATCH)
    with (
        patch("bdfast.defenses.stages.climb", climb),
        patch("bdfast.defenses.stages.Judge", judge_of),
        patch("bdfast.training.budget.LEAST_BATCH", least_batch),
        patch.object(METHODS[method], "rates", tuple(rates or METHODS[method].rates)),
        patch.object(METHODS[method], "unsuspected", None),
    ):
        try:
            bdfast.purify(model, ImageTensors(*case.clean), method=method, seed=seed, **options)
        except Exception as error:
            rows.append(
                {**case.name, "method": method, "options": options, "error": f"{type(error).__name__}: {error}"}
            )
    if rates or least_batch != LEAST_BATCH:
        options = {**options, "rates": rates, "least_batch": least_batch}
    return [{**found, "options": options} for found in rows]


def _study(case: Case, methods: list[tuple[str, dict[str, Any]]], seed: int, file: Path) -> str:
    kept: dict[tuple[str, int | None], Judge] = {}
    for method, options in methods:
        rows = watched(case, method, options, kept, seed)
        with file.open("a") as out:
            out.write("".join(json.dumps(row) + "\n" for row in rows))
    return " ".join(case.name.values())


def _configs(methods: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """`ft_sam:rho=1:updates=60` -> ("ft_sam", {"rho": 1, "updates": 60})."""
    found = []
    for text in methods:
        name, *pairs = text.split(":")
        found.append((name, {key: json.loads(value) for key, value in (pair.split("=") for pair in pairs)}))
    return found


def run(
    grid: Annotated[Path, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.Positional],
    methods: tuple[str, ...],
    file: Path,
    split: str = "tune",
    seed: int = 0,
    workers: int = 1,
    only: str = "",
) -> None:
    """Study the cases of a grid."""
    _all(
        [case for case in cases(grid, output, split) if only in " ".join(case.name.values())],
        methods,
        file,
        seed,
        workers,
    )


def pack(
    grid: Annotated[Path, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.Positional],
    file: Path,
    split: str = "tune",
) -> None:
    """Put the cases into one file."""
    torch.save([as_dict(case) for case in cases(grid, output, split)], file)


def packed(
    cases_file: Annotated[Path, tyro.conf.Positional],
    methods: tuple[str, ...],
    file: Path,
    seed: int = 0,
    workers: int = 1,
    only: str = "",
) -> None:
    """Study packed cases."""
    loaded = [Case(**case) for case in torch.load(cases_file, weights_only=True)]
    _all([case for case in loaded if only in " ".join(case.name.values())], methods, file, seed, workers)


def as_dict(case: Case) -> dict[str, Any]:
    return {field.name: getattr(case, field.name) for field in fields(case)}


def _all(studied: list[Case], methods: Sequence[str], file: Path, seed: int, workers: int) -> None:
    configs = _configs(methods)
    if workers == 1:
        for case in studied:
            print(_study(case, configs, seed, file), flush=True)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        parts = [configs[first : first + CHUNK] for first in range(0, len(configs), CHUNK)]
        tasks = [pool.submit(_study, case, part, seed, file) for part in parts for case in studied]
        for done in as_completed(tasks):
            print(done.result(), flush=True)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"run": run, "pack": pack, "packed": packed}, description=__doc__)
