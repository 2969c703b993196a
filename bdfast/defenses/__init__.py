"""Defenses that purify a trained model with clean data. One file each; names in `METHODS`."""

from bdfast.defenses.anp import ANPDefense
from bdfast.defenses.base import DataFree, Defense, Outcome
from bdfast.defenses.clp import CLPDefense
from bdfast.defenses.d3 import D3Defense
from bdfast.defenses.fine_pruning import FinePruningDefense
from bdfast.defenses.fst import FSTDefense
from bdfast.defenses.ft import FTDefense
from bdfast.defenses.ft_sam import FTSAMDefense
from bdfast.defenses.ibau import IBAUDefense
from bdfast.defenses.ims import IMSDefense
from bdfast.defenses.nad import NADDefense
from bdfast.defenses.otbr import OTBRDefense
from bdfast.defenses.pam import PAMDefense
from bdfast.defenses.parts.scaled_skips import set_scaled_sums
from bdfast.defenses.result import PurificationError, PurifyResult
from bdfast.defenses.rnp import RNPDefense
from bdfast.defenses.sam import SAMDefense
from bdfast.defenses.sau import SAUDefense
from bdfast.defenses.ssft import SSFTDefense
from bdfast.defenses.stages import Begun, Staged
from bdfast.defenses.tsbd import TSBDDefense
from bdfast.defenses.uau import UAUDefense
from bdfast.defenses.ulrl import ULRLDefense
from bdfast.defenses.verdict import Verdict

METHODS: dict[str, type[Defense]] = {
    "uau": UAUDefense,
    "pam": PAMDefense,
    "ft_sam": FTSAMDefense,
    "tsbd": TSBDDefense,
    "sau": SAUDefense,
    "i_bau": IBAUDefense,
    "ulrl": ULRLDefense,
    "rnp": RNPDefense,
    "anp": ANPDefense,
    "ims": IMSDefense,
    "clp": CLPDefense,
    "otbr": OTBRDefense,
    "fst": FSTDefense,
    "d3": D3Defense,
    "nad": NADDefense,
    "ssft": SSFTDefense,
    "fine_pruning": FinePruningDefense,
    "ft": FTDefense,
    "sam": SAMDefense,
}

__all__ = [
    "METHODS",
    "ANPDefense",
    "Begun",
    "CLPDefense",
    "D3Defense",
    "DataFree",
    "Defense",
    "FSTDefense",
    "FTDefense",
    "FTSAMDefense",
    "FinePruningDefense",
    "IBAUDefense",
    "IMSDefense",
    "NADDefense",
    "OTBRDefense",
    "Outcome",
    "PAMDefense",
    "PurificationError",
    "PurifyResult",
    "RNPDefense",
    "SAMDefense",
    "SAUDefense",
    "SSFTDefense",
    "Staged",
    "TSBDDefense",
    "UAUDefense",
    "ULRLDefense",
    "Verdict",
    "set_scaled_sums",
]
