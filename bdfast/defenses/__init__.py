"""Defenses that purify a trained model with clean data. One file each; names in `METHODS`."""

from bdfast.defenses.base import Defense, Outcome
from bdfast.defenses.ft import FT
from bdfast.defenses.ft_sam import FTSAM
from bdfast.defenses.pam import PathAwareTuning
from bdfast.defenses.result import PurifyResult
from bdfast.defenses.sam import SAMTuning
from bdfast.defenses.tsbd import TSBD

METHODS: dict[str, type[Defense]] = {"tsbd": TSBD, "ft_sam": FTSAM, "pam": PathAwareTuning, "ft": FT, "sam": SAMTuning}

__all__ = ["FT", "FTSAM", "METHODS", "TSBD", "Defense", "Outcome", "PathAwareTuning", "PurifyResult", "SAMTuning"]
