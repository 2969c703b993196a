"""The networks of a grid: each is trained once, and lies in the output folder under a digest of all that decides it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from bdfast._version import __version__
from bdfast.attacks import Attack, PreparedAttack
from bdfast.attacks.trigger_files import read_trigger, save_trigger, trigger_path
from bdfast.data.data_source import DataSource
from bdfast.data.images import ImageTensors
from bdfast.files import write_json
from bdfast.io import load_into, save_weights
from bdfast.matrix.cells import Cell, content_digest
from bdfast.matrix.entries import NONE, AttackEntry, NetworkEntry
from bdfast.matrix.images_by_name import DataFacts
from bdfast.matrix.records import processor
from bdfast.matrix.shares import RESERVE, order
from bdfast.models import ModelSpec
from bdfast.scenario import Plan, plant, untrained
from bdfast.training import fit
from bdfast.training.seeds import derived_seed

CLEAN = AttackEntry(NONE, NONE, {})


@dataclass(frozen=True, eq=False)
class Training:
    """One network to train.

    Attributes:
        network: The architecture, and how it is trained.
        attack: What is planted; kind "none" for nothing.
        seed: Of fresh weights, of the poisoned images and of the order of the batches.
        epochs: Of the training.
        facts: Of the images.
    """

    network: NetworkEntry
    attack: AttackEntry
    seed: int
    epochs: int
    facts: DataFacts

    @property
    def spec(self) -> ModelSpec:
        """The network for these images, normalised by its own mean and std, where it has them, else by theirs."""
        facts = self.facts
        channels = facts.shape[0]
        options: dict[str, Any] = {**self.network.options, "num_classes": facts.num_classes}
        for key in ("mean", "std"):
            values = options.get(key) or getattr(facts, key)
            options[key] = tuple(values) * channels if len(values) == 1 else tuple(values)
        options |= {"in_channels": channels, "image_size": facts.shape[1]}
        return ModelSpec(**options, class_names=facts.class_names)

    def content(self) -> dict[str, Any]:
        """All that decides the weights, as JSON holds it. That is neither the defender's share nor what judges."""
        return {
            "bdfast": __version__,
            "spec": json.loads(self.spec.to_json()),
            "data": self.facts.digest,
            "reserve": RESERVE,
            "attack": {key: value for key, value in self.attack.content().items() if key != "trigger"},
            "seed": self.seed,
            "epochs": self.epochs,
            "lr": self.network.lr,
        }

    @property
    def digest(self) -> str:
        """The name of its files."""
        return content_digest(self.content())[:24]

    @property
    def before(self) -> Training | None:
        """The clean network that the attack looks at before it has a trigger; None for most attacks."""
        attack = self.attack.attack(self.facts.num_classes)
        if not isinstance(attack, PreparedAttack):
            return None
        return Training(self.network, CLEAN, self.seed, self.epochs, self.facts)


def training_of(cell: Cell, facts: DataFacts) -> Training:
    """The network that a cell is about."""
    epochs = cell.asked_epochs or facts.epochs
    return Training(cell.network, cell.attack, cell.seed, epochs, facts)


@dataclass(frozen=True, eq=False)
class Trained:
    """A network with its attack.

    Attributes:
        model: In eval mode.
        attack: What was planted, with its trigger; None for nothing.
        seconds: That the training took.
    """

    model: nn.Module
    attack: Attack | None
    seconds: float


class NetworkStore:
    """The networks in a folder: weights, a JSON file with the facts, and the trigger where a network made it.

    The facts are written last, so that a network counts only once all of it is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, digest: str) -> bool:
        """Whether this network is there as a whole."""
        return self._path(digest, "json").is_file()

    def load(self, training: Training) -> Trained:
        """The network, on the GPU where there is one.

        Raises:
            ValueError: The file is not the one that was written.
        """
        facts = json.loads(self._path(training.digest, "json").read_text(encoding="utf-8"))
        weights = self._path(training.digest, "safetensors")
        model = load_into(untrained(training.spec), weights)
        attack = training.attack.attack(training.facts.num_classes)
        if isinstance(attack, PreparedAttack):
            attack = read_trigger(attack, trigger_path(weights))
        return Trained(model.eval(), attack, facts["seconds"])

    def train(self, training: Training, source: DataSource) -> None:
        """Train the network, unless it is there."""
        if self.has(training.digest):
            return
        started = perf_counter()
        positions = order(len(source.train), training.seed)
        attacker, aside = (source.train.subset(part) for part in positions)
        clean = None if (before := training.before) is None else self.load(before).model
        model, attack = _planted(training, source, attacker, aside, clean)
        seconds = perf_counter() - started
        weights = self._path(training.digest, "safetensors")
        if isinstance(attack, PreparedAttack):
            save_trigger(attack, trigger_path(weights))
        save_weights(model, weights, description=training.spec.to_json())
        machine = {"processor": processor(), "threads": torch.get_num_threads()}
        facts = {**training.content(), "torch": torch.__version__, "machine": machine, "seconds": seconds}
        write_json(self._path(training.digest, "json"), facts)

    def _path(self, digest: str, kind: str) -> Path:
        return self.folder / f"{digest}.{kind}"


def _planted(
    training: Training, source: DataSource, attacker: ImageTensors, aside: ImageTensors, clean: nn.Module | None
) -> tuple[nn.Module, Attack | None]:
    """The network, and the attack with its trigger."""
    attack = training.attack.attack(training.facts.num_classes)
    lr = training.network.lr
    if attack is None:
        model = untrained(training.spec, seed=training.seed)
        fit(model, attacker, epochs=training.epochs, lr=lr, seed=training.seed)
        return model.eval(), None
    if clean is not None and isinstance(attack, PreparedAttack):
        attack = attack.prepared(clean, attacker, seed=derived_seed(training.seed, "prepare"))
    plan = Plan(
        source=source,
        attack=attack,
        clean=aside,
        attacker=attacker,
        spec=training.spec,
        epochs=training.epochs,
    )
    scenario = plant(plan, seed=training.seed, lr=lr)
    return scenario.model, scenario.attack
