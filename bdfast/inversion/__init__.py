"""Guessing the trigger of a backdoored network from clean images."""

from bdfast.inversion.bti_dbf import BTIDBF, Inversion, invert_trigger
from bdfast.inversion.generator import Generator

__all__ = ["BTIDBF", "Generator", "Inversion", "invert_trigger"]
