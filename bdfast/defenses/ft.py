"""FT: plain fine-tuning, the baseline of all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from bdfast.data.batches import Batches
from bdfast.defenses.base import Outcome
from bdfast.defenses.fine_tuning import FineTuning
from bdfast.training import Run
from bdfast.training.copies import copy_of


@dataclass(frozen=True)
class FTDefense(FineTuning):
    """Plain fine-tuning on the clean images: what every defense is compared with.

    It leaves most backdoors alive; BackdoorBench (Wu et al., NeurIPS 2022), method "ft".
    """

    paper: ClassVar[str] = "Wu et al., BackdoorBench, NeurIPS 2022, arXiv 2206.12654"

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Outcome:
        """Purify `model` in place; see `Defense.run`."""
        self.fine_tune(model, copy_of(model), clean, run, "fine-tune")
        return Outcome()
