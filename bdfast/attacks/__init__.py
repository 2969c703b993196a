"""Attacks: what a backdoor looks like, to test defenses on. One file each; names in `METHODS`."""

from bdfast.attacks.badnets import BadNets
from bdfast.attacks.base import Attack, all_to_all
from bdfast.attacks.blended import Blended
from bdfast.attacks.input_aware import InputAware
from bdfast.attacks.label_consistent import LabelConsistent
from bdfast.attacks.low_frequency import LowFrequency
from bdfast.attacks.poisoning import Triggered, poisoned
from bdfast.attacks.prepared import PreparedAttack
from bdfast.attacks.trojan_nn import TrojanNN

METHODS: dict[str, type[Attack]] = {
    "badnets": BadNets,
    "blended": Blended,
    "input_aware": InputAware,
    "label_consistent": LabelConsistent,
    "lf": LowFrequency,
    "trojannn": TrojanNN,
}

__all__ = [
    "METHODS",
    "Attack",
    "BadNets",
    "Blended",
    "InputAware",
    "LabelConsistent",
    "LowFrequency",
    "PreparedAttack",
    "Triggered",
    "TrojanNN",
    "all_to_all",
    "poisoned",
]
