"""LF: a smooth pattern, made with a network, that is added to the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from bdfast.attacks.prepared import PreparedAttack, answers, attacker, some_images
from bdfast.training.seeds import derived_seed

LR = 0.1
"""Learning rate (Adam) of the pattern before smoothing, whose values have standard deviation 1."""


@dataclass(frozen=True)
class LowFrequency(PreparedAttack):
    """Zeng, Park, Mao and Jia, "Rethinking the backdoor attacks' triggers: a frequency perspective" (ICCV 2021).

    One pattern v for all images: v = N(G(r)), where G is a Gaussian low-pass filter and N brings the values to
    [0, `amplitude`]; x' = clip(x + v). The published search adds up steps of targeted DeepFool, one image at a time,
    filters and rescales after each, and ends once enough images follow. Ours descends the cross-entropy of a batch
    with regard to r, through N and G, and keeps the best pattern it met. At the border G weighs the pixels that there
    are, where the published filter takes zeros. The public code of BackdoorBench stores v with an offset that its
    consumer does not take off again, and some of its stored patterns change no pixel; neither is copied.

    Attributes:
        amplitude: Largest value of the pattern; published: 0.2.
        smoothness: Standard deviation of the filter, as a fraction of the shorter side.
        images: Clean images that the pattern is fitted to; published: 100.
        steps: Steps of the search.
    """

    amplitude: float = 0.2
    smoothness: float = 0.1
    images: int = 100
    steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.amplitude <= 1:
            raise ValueError(f"amplitude: expected a number in (0, 1], got {self.amplitude}; the paper uses 0.2.")
        for name in ("smoothness", "images", "steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}; leave it at its default.")

    def prepare(self, network: nn.Module, data: Dataset[Any], *, seed: int = 0) -> Mapping[str, torch.Tensor]:
        """Find the pattern; arguments as for `PreparedAttack.prepare`.

        Returns:
            "pattern" [C, H, W] float32 in [0, `amplitude`].
        """
        with attacker(network, data, seed) as (net, batches):
            clean, labels = some_images(batches, self.images, derived_seed(seed, "images"))
            targets = self.relabel(labels)
            # Images that are of the target class already would say that every pattern is a good one.
            others = targets != labels
            clean, targets = (clean[others], targets[others]) if bool(others.any()) else (clean, targets)
            rows, columns = (
                _low_pass(size, self.smoothness * min(clean.shape[-2:])).to(clean) for size in clean.shape[-2:]
            )
            raw = torch.randn(clean.shape[1:]).to(clean).requires_grad_()
            optimizer = torch.optim.Adam([raw], lr=LR)
            best, least = torch.zeros_like(raw), float("inf")
            for _ in range(self.steps):
                smooth = rows @ raw @ columns.T
                low, high = smooth.amin(), smooth.amax()
                pattern = (smooth - low) / (high - low).clamp_min(1e-12) * self.amplitude
                loss = F.cross_entropy(answers(net, (clean + pattern).clamp(0, 1)), targets)
                if (value := float(loss.detach())) < least:
                    best, least = pattern.detach(), value
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return {"pattern": best.clamp(0, self.amplitude).float().cpu()}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a triggered copy.

        Raises:
            ValueError: There is no trigger yet, or it was made for images of another shape.
        """
        pattern = self.found("pattern")
        self.check_shape(images, pattern.shape)
        return (images + pattern.to(images)).clamp_(0, 1)


def _low_pass(size: int, deviation: float) -> torch.Tensor:
    """[size, size]: row i has the weights with which a Gaussian around pixel i averages the pixels of a line."""
    places = torch.arange(size, dtype=torch.float32)
    weights = torch.exp(-((places[:, None] - places) ** 2) / (2 * deviation**2))
    return weights / weights.sum(1, keepdim=True)
