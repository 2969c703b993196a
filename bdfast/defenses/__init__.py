"""Defenses that purify a trained model with clean data. One file each; names in `METHODS`."""

from bdfast.defenses.base import Defense, Outcome
from bdfast.defenses.result import PurifyResult
from bdfast.defenses.tsbd import TSBD

METHODS: dict[str, type[Defense]] = {"tsbd": TSBD}

__all__ = ["METHODS", "TSBD", "Defense", "Outcome", "PurifyResult"]
