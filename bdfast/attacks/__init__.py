"""Attacks: what a backdoor looks like, to test defenses on. One file each; names in `METHODS`."""

from bdfast.attacks.badnets import BadNets
from bdfast.attacks.base import Attack
from bdfast.attacks.blended import Blended
from bdfast.attacks.poisoning import Triggered, poisoned

METHODS: dict[str, type[Attack]] = {"badnets": BadNets, "blended": Blended}

__all__ = ["METHODS", "Attack", "BadNets", "Blended", "Triggered", "poisoned"]
