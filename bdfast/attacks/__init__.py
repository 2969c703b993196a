"""Attacks: what a backdoor looks like, to test defenses on. One file each; names in `METHODS`."""

from bdfast.attacks.badnets import BadNets
from bdfast.attacks.base import Attack, all_to_all
from bdfast.attacks.blended import Blended
from bdfast.attacks.bpp import Bpp
from bdfast.attacks.frequency import CTRL, Frequency, FTrojan
from bdfast.attacks.input_aware import InputAware
from bdfast.attacks.label_consistent import LabelConsistent
from bdfast.attacks.low_frequency import LowFrequency
from bdfast.attacks.poisoning import Triggered, poisoned
from bdfast.attacks.prepared import PreparedAttack
from bdfast.attacks.sig import SIG
from bdfast.attacks.trojan_nn import TrojanNN
from bdfast.attacks.wanet import WaNet

METHODS: dict[str, type[Attack]] = {
    "badnets": BadNets,
    "blended": Blended,
    "bpp": Bpp,
    "ctrl": CTRL,
    "ftrojan": FTrojan,
    "input_aware": InputAware,
    "label_consistent": LabelConsistent,
    "lf": LowFrequency,
    "sig": SIG,
    "trojannn": TrojanNN,
    "wanet": WaNet,
}

__all__ = [
    "CTRL",
    "METHODS",
    "SIG",
    "Attack",
    "BadNets",
    "Blended",
    "Bpp",
    "FTrojan",
    "Frequency",
    "InputAware",
    "LabelConsistent",
    "LowFrequency",
    "PreparedAttack",
    "Triggered",
    "TrojanNN",
    "WaNet",
    "all_to_all",
    "poisoned",
]
