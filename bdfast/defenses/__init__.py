"""Defenses that purify a trained model with clean data. One file each; names in `METHODS`."""

from bdfast.defenses.base import Defense, Outcome
from bdfast.defenses.ft import FTDefense
from bdfast.defenses.ft_sam import FTSAMDefense
from bdfast.defenses.pam import PAMDefense
from bdfast.defenses.result import PurifyResult
from bdfast.defenses.sam import SAMDefense
from bdfast.defenses.tsbd import TSBDDefense
from bdfast.defenses.uau import UAUDefense
from bdfast.defenses.verdict import Verdict

METHODS: dict[str, type[Defense]] = {
    "tsbd": TSBDDefense,
    "ft_sam": FTSAMDefense,
    "pam": PAMDefense,
    "ft": FTDefense,
    "sam": SAMDefense,
    "uau": UAUDefense,
}

__all__ = [
    "METHODS",
    "Defense",
    "FTDefense",
    "FTSAMDefense",
    "Outcome",
    "PAMDefense",
    "PurifyResult",
    "SAMDefense",
    "TSBDDefense",
    "UAUDefense",
    "Verdict",
]
