"""What a process of a run does: train a network, or measure a cell."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn

from bdfast.attacks import Triggered
from bdfast.data.data_source import DataSource
from bdfast.defenses import PurifyResult
from bdfast.defenses.purification import purify
from bdfast.evaluation import Evaluator, Metrics
from bdfast.matrix.cells import Cell
from bdfast.matrix.feasibility import clean_positions
from bdfast.matrix.images_by_name import DataFacts, load_data
from bdfast.matrix.networks import NetworkStore, Training, training_of
from bdfast.matrix.records import error_found, peak_memory_mib, record_of, write_record
from bdfast.task import device_of
from bdfast.training import Setup
from bdfast.training.descriptions import plain


class Subject(NamedTuple):
    """A network with what judges it."""

    key: str
    model: nn.Module
    evaluator: Evaluator
    before: Metrics
    training_seconds: float


class Workshop:
    """Trains and measures, and keeps the images and the network that it used last.

    Args:
        output: Folder of the run.
        facts: Of the images, by name.
    """

    def __init__(self, output: Path, facts: dict[str, DataFacts]) -> None:
        self.output, self.facts = output, facts
        self.store = NetworkStore(output / "networks")
        self._source: tuple[str, DataSource] | None = None
        self._subject: Subject | None = None

    def train(self, training: Training) -> dict[str, Any] | None:
        """Train a network into the folder; returns what to record of an error, if there was one."""
        try:
            self.store.train(training, self._images(training.facts.name))
        except Exception as error:  # whatever it is, the other cells go on
            return error_found(error, "training")
        return None

    def measure(self, cell: Cell) -> bool:
        """Write the record of a cell; returns whether it was measured, and not an error."""
        work = self.output / "work" / cell.id
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = self._measured(cell, work)
            said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
            found["warnings"] = list(dict.fromkeys([*found["warnings"], *said]))
        except Exception as error:  # whatever it is, the other cells go on
            found = error_found(error, "purifying")
        write_record(self.output / "records", record_of(cell, found))
        # Only now: until there is a record, a run that starts again goes on from here.
        shutil.rmtree(work, ignore_errors=True)
        return "error" not in found

    def _measured(self, cell: Cell, work: Path) -> dict[str, Any]:
        source, facts = self._images(cell.data), self.facts[cell.data]
        subject = self._network(cell, source)
        positions = clean_positions(cell, source, facts)
        started = perf_counter()
        result = self._purified(cell, subject.model, source, positions, work)
        seconds = perf_counter() - started
        model = subject.model if result is None else result.model
        after = (
            subject.before.against(subject.before)
            if result is None
            else subject.evaluator(model, baseline=subject.before)
        )
        setup = next((row for row in getattr(result, "history", ()) if isinstance(row, Setup)), None)
        training = training_of(cell, facts)
        return {
            "network_digest": training.digest,
            "data_digest": facts.digest,
            "epochs": training.epochs,
            "clean_images": len(positions),
            "device": str(device_of(model)),
            "precision": setup and setup.precision,
            "seconds": {"training": subject.training_seconds, "purifying": seconds},
            "peak_memory_mib": peak_memory_mib(),
            "updates": 0 if result is None else result.updates,
            "before": _figures(subject.before),
            "after": _figures(after),
            "der": after.der,
            "rir": after.rir,
            "verdict": None if result is None or result.verdict is None else result.verdict.as_json(),
            "options": {} if result is None else plain(result.options),
            "found": {} if result is None else plain(result.found),
            "warnings": [] if result is None else list(result.warnings),
        }

    def _purified(
        self, cell: Cell, model: nn.Module, source: DataSource, positions: torch.Tensor, work: Path
    ) -> PurifyResult | None:
        defense = cell.defense.defense()
        if defense is None:
            return None
        clean = source.train.subset(positions) if len(positions) else None
        return purify(model, clean, method=defense, workdir=work, seed=cell.seed, **cell.defense.settings)

    def _images(self, name: str) -> DataSource:
        if self._source is None or self._source[0] != name:
            self._source = None  # not two at once
            self._source = (name, load_data(name))
        return self._source[1]

    def _network(self, cell: Cell, source: DataSource) -> Subject:
        """The network of a cell, and its figures with the trigger that the cell names."""
        facts = self.facts[cell.data]
        training = training_of(cell, facts)
        key = f"{training.digest} {cell.attack.content()}"
        if self._subject is None or self._subject.key != key:
            self._subject = None
            trained = self.store.load(training)
            judge = trained.attack or cell.attack.judge(facts.num_classes)
            triggered = None if judge is None else Triggered(source.test, judge)
            evaluator = Evaluator(source.test, triggered, device=device_of(trained.model))
            self._subject = Subject(key, trained.model, evaluator, evaluator(trained.model), trained.seconds)
        return self._subject


def _figures(metrics: Metrics) -> dict[str, float | None]:
    return {"acc": metrics.acc, "asr": metrics.asr, "ra": metrics.ra}
