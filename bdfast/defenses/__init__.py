"""Defenses that purify a trained model with clean data. One file each; names in `METHODS`."""

from bdfast.defenses.base import Defense, Outcome
from bdfast.defenses.ft import FTDefense
from bdfast.defenses.ft_sam import FTSAMDefense
from bdfast.defenses.ibau import IBAUDefense
from bdfast.defenses.pam import PAMDefense
from bdfast.defenses.result import PurificationError, PurifyResult
from bdfast.defenses.sam import SAMDefense
from bdfast.defenses.sau import SAUDefense
from bdfast.defenses.stages import Begun, Staged
from bdfast.defenses.tsbd import TSBDDefense
from bdfast.defenses.uau import UAUDefense
from bdfast.defenses.verdict import Verdict

METHODS: dict[str, type[Defense]] = {
    "uau": UAUDefense,
    "pam": PAMDefense,
    "ft_sam": FTSAMDefense,
    "tsbd": TSBDDefense,
    "sau": SAUDefense,
    "i_bau": IBAUDefense,
    "ft": FTDefense,
    "sam": SAMDefense,
}

__all__ = [
    "METHODS",
    "Begun",
    "Defense",
    "FTDefense",
    "FTSAMDefense",
    "IBAUDefense",
    "Outcome",
    "PAMDefense",
    "PurificationError",
    "PurifyResult",
    "SAMDefense",
    "SAUDefense",
    "Staged",
    "TSBDDefense",
    "UAUDefense",
    "Verdict",
]
