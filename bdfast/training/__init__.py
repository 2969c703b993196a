"""Training: the loop that every method runs on, plain training, and what both need: seeds, modes, checkpoints."""

from bdfast.training.fitting import fit
from bdfast.training.history import Epoch, History, Probe, Row, Setup
from bdfast.training.loop import Run

__all__ = ["Epoch", "History", "Probe", "Row", "Run", "Setup", "fit"]
