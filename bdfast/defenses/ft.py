"""FT: plain fine-tuning, the baseline of all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from bdfast.data.batches import Batches
from bdfast.defenses.stages import Begun, Staged
from bdfast.inversion.surrogates import Surrogates
from bdfast.training import Run


@dataclass(frozen=True)
class FTDefense(Staged):
    """Plain fine-tuning on the clean images: what every defense is compared with.

    At the published rate, 0.01, it leaves most backdoors alive; BackdoorBench (Wu et al., NeurIPS 2022), method "ft".
    """

    paper: ClassVar[str] = "Wu et al., BackdoorBench, NeurIPS 2022, arXiv 2206.12654"

    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """See `Staged.begin`."""
        return Begun(lambda options, images, stage: options.fine_tune(model, given, images, run, stage))
