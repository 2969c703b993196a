"""Whether the cells of a grid can be had with their images, found out before anything trains."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bdfast.attacks import Attack, PreparedAttack
from bdfast.data.data_source import DataSource
from bdfast.defenses import METHODS, DataFree
from bdfast.matrix.cells import Cell, content_digest
from bdfast.matrix.clean_images import Clean
from bdfast.matrix.entries import NONE, AttackEntry
from bdfast.matrix.grid import Grid
from bdfast.matrix.images_by_name import DataFacts, data_facts, load_data
from bdfast.matrix.networks import Training, training_of
from bdfast.matrix.places import GridError
from bdfast.matrix.shares import drawn, order
from bdfast.task import logits_of
from bdfast.training.seeds import seeded

PROBED = 2
"""Images that a network and a trigger are tried on."""


def check_grid(grid: Grid) -> dict[str, DataFacts]:
    """Load the images of a grid and see that every cell can be had: network, target, poison rate, clean images.

    Returns:
        What the cells have to know about their images, by name.

    Raises:
        GridError: A cell cannot be had; the message names the line.
        SourceUnavailable: Images cannot be had.
    """
    found = {}
    for cell in grid.cells:
        _check_data_free(cell)
    for name in dict.fromkeys(cell.data for cell in grid.cells):
        source = load_data(name)
        found[name] = facts = data_facts(name, source)
        cells = [cell for cell in grid.cells if cell.data == name]
        for cell in {content_digest(cell.network.content()): cell for cell in reversed(cells)}.values():
            _check_network(training_of(cell, facts), source)
        for attack, seed in _pairs((cell.attack, cell.seed) for cell in cells):
            _check_attack(attack, seed, source, facts)
        for clean, seed in _pairs((cell.clean, cell.seed) for cell in cells):
            _check_clean(clean, seed, source, facts)
    return found


def clean_positions(cell: Cell, source: DataSource, facts: DataFacts) -> torch.Tensor:
    """Positions [N] of the defender's images among the training images."""
    classes = facts.num_classes
    wanted = cell.clean
    if wanted.share == 0:
        return torch.zeros(0, dtype=torch.long)
    return drawn(source.train.labels, cell.seed, num_classes=classes, share=wanted.share, per_class=wanted.per_class)


def _check_network(training: Training, source: DataSource) -> None:
    images = source.train.batch(torch.arange(PROBED))[0]
    try:
        with seeded(0, torch.device("cpu")), torch.no_grad():
            logits = logits_of(training.spec.build().eval()(images))
    except Exception as error:  # a network of the user's own can fail in any way
        raise GridError(
            f"{training.network.place}: expected a network that takes images {list(images.shape[1:])} of "
            f"{training.facts.name}, got an error from it ({str(error).rstrip('.')}); choose another, or other images."
        ) from error
    if logits.shape != (PROBED, training.facts.num_classes):
        raise GridError(
            f"{training.network.place}: expected {training.facts.num_classes} outputs for {training.facts.name}, got "
            f"{list(logits.shape[1:])}; use num_classes of the ModelSpec."
        )


def _check_attack(entry: AttackEntry, seed: int, source: DataSource, facts: DataFacts) -> None:
    try:
        attack, judge = entry.attack(facts.num_classes), entry.judge(facts.num_classes)
        if entry.trigger is not None and isinstance(judge, PreparedAttack):
            raise ValueError(
                f"trigger: expected one that needs no network, got {entry.trigger.kind}, whose trigger is made for "
                "one; choose another."
            )
        if judge is not None:
            _check_trigger(judge, source, facts)
        if attack is not None:
            labels = source.train.labels[order(len(source.train), seed)[0]]
            _check_rate(attack, labels)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise GridError(f"{entry.place}, with {facts.name}: {error}") from error


def _check_trigger(attack: Attack, source: DataSource, facts: DataFacts) -> None:
    classes = facts.num_classes
    labels = attack.relabel(torch.arange(classes))
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"target: expected a class from 0 to {classes - 1}, got {int(labels.max())}; {facts.name} has {classes}."
        )
    if isinstance(attack, PreparedAttack):
        return  # it has no trigger before there is a network
    images = source.test.batch(torch.arange(PROBED))[0]
    triggered = attack(images)
    if triggered.shape != images.shape:
        raise ValueError(
            f"attack: expected triggered images {list(images.shape)}, got {list(triggered.shape)}; keep the shape."
        )


def _check_rate(attack: Attack, labels: torch.Tensor) -> None:
    victims = int(attack.victims(labels).sum())
    count = round(attack.poison_rate * len(labels))
    if not 1 <= count <= victims:
        raise ValueError(
            f"poison_rate: expected from 1 to {victims} images, which is what the attack can poison of {len(labels)}, "
            f"got {attack.poison_rate}, which is {count}; choose a rate from {1 / len(labels):.2g} to "
            f"{victims / len(labels):.3f}."
        )


def _check_data_free(cell: Cell) -> None:
    kind = cell.defense.kind
    if cell.clean.share == 0 and kind != NONE and not issubclass(METHODS[kind], DataFree):
        able = ", ".join(name for name, cls in METHODS.items() if issubclass(cls, DataFree))
        raise GridError(
            f"{cell.clean.place}: expected a defense that needs no images ({able}), got {kind}; leave this cell out "
            "with exclude."
        )


def _check_clean(clean: Clean, seed: int, source: DataSource, facts: DataFacts) -> None:
    if clean.share == 0:
        return
    try:
        drawn(source.train.labels, seed, num_classes=facts.num_classes, share=clean.share, per_class=clean.per_class)
    except ValueError as error:
        raise GridError(f"{clean.place}, with {facts.name}: {error}") from error


def _pairs(pairs: Iterable[tuple]) -> list[tuple]:
    """Different pairs of an entry and a seed, in order."""
    return list({(id(entry), seed): (entry, seed) for entry, seed in pairs}.values())
