"""SAM: fine-tuning with plain SAM, the baseline of FT-SAM and PAM."""

from __future__ import annotations

from dataclasses import dataclass

from bdfast.defenses.ft_sam import FTSAM


@dataclass(frozen=True)
class SAMTuning(FTSAM):
    """Fine-tuning with SAM as Foret et al. (ICLR 2021) give it, without a teacher or overlays: FT-SAM less its adaptive
    perturbation.

    Attributes:
        rho: Radius of the perturbation; left out, `bdfast.selection` chooses it from clean data.
    """

    paper = "Foret et al., ICLR 2021, arXiv 2010.01412"

    epochs: int = 10
    lr: float = 0.01
    rho: float | None = 0.05
    adaptive: bool = False
    distill: float = 0.0
    overlay: float = 0.0
