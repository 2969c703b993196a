"""One cell of a grid: a network, its data, its attack, the clean images, a defense and a seed."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bdfast.matrix.clean_images import Clean
from bdfast.matrix.entries import AttackEntry, DefenseEntry, NetworkEntry
from bdfast.training.descriptions import plain

AXES = ("network", "data", "attack", "clean", "defense", "seed")


def content_digest(content: Any) -> str:
    """SHA-256 of something that JSON holds, the same on every machine."""
    return hashlib.sha256(json.dumps(plain(content), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Cell:
    """One measurement of a grid.

    Attributes:
        network: The network and how it is trained.
        data: Name of the images.
        attack: What was planted.
        clean: What the defender has.
        defense: What he does.
        seed: Of all randomness.
        epochs: Of the attacker's training, where the network says none; that of the data when None.
        split: "tune", "confirm" or None: what the case is for. It goes into the record and changes nothing.
    """

    network: NetworkEntry
    data: str
    attack: AttackEntry
    clean: Clean
    defense: DefenseEntry
    seed: int
    epochs: int | None = None
    split: str | None = None

    def content(self) -> dict[str, Any]:
        """All that decides about its result, as JSON holds it; neither names nor the split."""
        return {
            "network": {**self.network.content(), "epochs": self.asked_epochs},
            "data": self.data,
            "attack": self.attack.content(),
            "clean": self.clean.content(),
            "defense": self.defense.content(),
            "seed": self.seed,
        }

    @property
    def asked_epochs(self) -> int | None:
        """Of the attacker's training; None for that of the data."""
        return self.network.epochs or self.epochs

    @cached_property
    def id(self) -> str:
        """The name of its record: readable, and the same for the same content."""
        clean = self.clean.name.replace(" %", "pct")
        kinds = (self.network.kind, self.data, self.attack.kind, clean, self.defense.kind, str(self.seed))
        readable = "_".join(re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")[:24] for kind in kinds)
        return f"{readable}_{content_digest(self.content())[:12]}"

    def __str__(self) -> str:
        names = (self.network.name, self.data, self.attack.name, self.clean.name, self.defense.name)
        return f"{' | '.join(names)} | seed {self.seed}"
