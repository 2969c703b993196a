"""Attacks: what a backdoor looks like, to test defenses on. One file each; names in `METHODS`."""

from bdfast.attacks.badnets import BadNets
from bdfast.attacks.base import Attack, all_to_all
from bdfast.attacks.blended import Blended
from bdfast.attacks.poisoning import Triggered, poisoned
from bdfast.attacks.prepared import PreparedAttack

METHODS: dict[str, type[Attack]] = {"badnets": BadNets, "blended": Blended}

__all__ = ["METHODS", "Attack", "BadNets", "Blended", "PreparedAttack", "Triggered", "all_to_all", "poisoned"]
