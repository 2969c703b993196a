"""MM-BD: a backdoor makes the network surer of its target label than it can be of any other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bdfast.data.batches import Batches
from bdfast.detectors.base import Detector, Finding
from bdfast.detectors.per_class import chosen, over_all
from bdfast.inversion.scene import Scene, scene_of
from bdfast.training import Run
from bdfast.training.seeds import derived_seed

NAME = "mm-bd"

FEWEST = 3
"""Classes that it takes: one that is tested, and two for the distribution of the others."""

LEAST_SPREAD = 0.01
"""Least spread of the margins, as a share of their mean: where they are all the same, one that is a thousandth larger
would be no chance."""

FEW = 1e-8
"""Below it, 1 - (1 - q)^K is K q."""


@dataclass(frozen=True)
class MMBD(Detector):
    """MM-BD: Wang et al., "MM-BD: Post-training detection of backdoor attacks with arbitrary backdoor pattern types
    using a maximum margin statistic" (S&P 2024).

    The margin of class c is the greatest logit_c - max_{k != c} logit_k that gradient ascent finds among all images in
    the range of the clean ones, from random starts; nothing else is taken from these. A distribution F is fitted to the
    margins of all classes but the one with the largest, r; p = 1 - F(r)^K is how likely the largest of K would be that
    large without a backdoor, with the exponent of the published code. The score is -log10(p).

    Ours are: F has no location that is fitted, too (in the published code it has), so that classes with a margin below
    0, which the network answers nowhere, are left out; a spread of at least a hundredth; images are brought back into
    the range in every step, and not only for the network; each image ends by itself, and the largest margin of all its
    steps counts. Nothing is computed in bfloat16, which is coarser than the tolerance.

    Attributes:
        starts: Images for each class.
        steps: Most steps of the ascent.
        lr: Step length: what a gradient of 1 moves a pixel by, both for pixels in [0, 1].
        tolerance: The ascent of an image ends when its margin changes by no more than this share of itself.
        null: The distribution of the margins without a backdoor. A gamma distribution, or an exponential one.
        classes: Labels to look at; all when left out.
    """

    paper: ClassVar[str] = "Wang et al., MM-BD, S&P 2024"
    scored_by: ClassVar[str] = "-log10 of the p-value of the largest margin"
    published_threshold: ClassVar[float | None] = -math.log10(0.05)

    PUBLISHED: ClassVar[dict[str, Any]] = {"starts": 30, "steps": 300, "lr": 0.01, "tolerance": 1e-5, "null": "gamma"}
    """The options of the published code on CIFAR-10."""

    starts: int = 10
    steps: int = 300
    lr: float = 0.01
    tolerance: float = 1e-5
    null: Literal["gamma", "exponential"] = "gamma"
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.check_positive("starts", "steps", "lr")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance: expected a number of at least 0, got {self.tolerance}; see its default.")
        self.check_one_of("null", "gamma", "exponential")
        super().__post_init__()

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Finding:
        """See `Detector.run`; evidence: "margin", in logits.

        Raises:
            ValueError: There are fewer than three classes to compare.
        """
        with scene_of(model, clean, replace(run, amp=False)) as scene:
            labels = chosen(self.classes, scene.classes)
            if len(labels) < FEWEST:
                raise ValueError(
                    f"classes: expected at least {FEWEST} classes to compare, got {len(labels)}; use another method."
                )
            pairs = [(label, start) for label in labels for start in range(self.starts)]
            found: list[float] = []
            with run.progress.stage(NAME, len(pairs)) as advance:
                for first in range(0, len(pairs), scene.chunk):
                    part = pairs[first : first + scene.chunk]
                    found += self._margins(scene, part, run.seed)
                    advance(len(found))
        margins = [max(found[first : first + self.starts]) for first in range(0, len(found), self.starts)]
        largest = labels[max(range(len(labels)), key=margins.__getitem__)]
        positive = [margin for margin in margins if margin > 0]
        notes = []
        if len(positive) < len(margins):
            absent = len(margins) - len(positive)
            notes.append(f"{absent} of {len(margins)} classes are answered nowhere in the range, and are left out.")
        if len(positive) < FEWEST:
            notes.append("Too few classes are left to compare; the score of 0 says nothing.")
        score = improbability(positive, self.null) if len(positive) >= FEWEST else 0.0
        return Finding(score, (largest,), {"margin": over_all(labels, margins, scene.classes)}, notes=tuple(notes))

    def _margins(self, scene: Scene, pairs: list[tuple[int, int]], seed: int) -> list[float]:
        """The margin that each (label, number of the start) leads to; but for rounding, the same in all batches."""
        drawn = [torch.Generator().manual_seed(derived_seed(seed, NAME, *pair)) for pair in pairs]
        x = torch.stack([torch.rand(scene.images.shape[1:], generator=draws) for draws in drawn])
        targets = torch.tensor([label for label, _ in pairs], device=scene.images.device)
        place = (scene.images.device, torch.promote_types(scene.images.dtype, torch.float32))
        return self._ascended(scene, targets, x.to(*place)).tolist()

    def _ascended(self, scene: Scene, targets: Tensor, x: Tensor) -> Tensor:
        """The largest margin [B] of the `targets` on the way from images x [B, C, H, W], in [0, 1], upwards."""
        best, before = x.new_full((len(x),), -torch.inf), x.new_full((len(x),), torch.nan)
        ended = torch.zeros_like(targets, dtype=torch.bool)
        for _ in range(self.steps):
            x = x.detach().requires_grad_()
            margins = margins_of(scene.logits(scene.limits[0] + scene.span * x), targets)
            (gradient,) = torch.autograd.grad(margins.sum(), x)
            margins = margins.detach().to(x.dtype)
            best = torch.where(ended, best, torch.maximum(best, margins))
            ended |= (margins - before).abs() <= self.tolerance * before.abs()
            if bool(ended.all()):
                break
            before = margins
            x = (x.detach() + self.lr * gradient).clamp(0, 1)
        return best


def margins_of(logits: Tensor, targets: Tensor) -> Tensor:
    """How far the logits of `targets` [B] are above all others: [B] of logits [B, K]."""
    own = targets[:, None]
    return logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).amax(1)


def improbability(margins: list[float], null: Literal["gamma", "exponential"]) -> float:
    """-log10(1 - F(r)^K) of the largest r of K margins, F fitted to all others: in float64, and never infinite.

    Args:
        margins: K of them, at least three, all above 0.
        null: See `MMBD`. "gamma" and "exponential" are fitted by the greatest likelihood.
    """
    *rest, largest = sorted(margins)
    shape = gamma_shape(rest) if null == "gamma" else 1.0
    log_q = log_survival(shape, shape * largest / (math.fsum(rest) / len(rest)))
    q = math.exp(log_q)
    if q >= 1:
        return 0.0
    log_p = log_q + math.log(len(margins)) if q < FEW else math.log(-math.expm1(len(margins) * math.log1p(-q)))
    return max(0.0, -log_p / math.log(10))


def gamma_shape(values: list[float]) -> float:
    """The shape of the gamma distribution with the greatest likelihood; its scale is the mean over the shape.

    It solves log(k) - digamma(k) = log(mean) - mean(log), by Newton's method.
    """
    mean = math.fsum(values) / len(values)
    gap = max(math.log(mean) - math.fsum(map(math.log, values)) / len(values), LEAST_SPREAD**2 / 2)
    # A start within a few hundredths of the solution.
    shape = torch.tensor((3 - gap + math.sqrt((gap - 3) ** 2 + 24 * gap)) / (12 * gap), dtype=torch.float64)
    for _ in range(20):
        value = shape.log() - torch.digamma(shape) - gap
        shape = shape - value / (1 / shape - torch.polygamma(1, shape))
    return float(shape)


def log_survival(shape: float, x: float) -> float:
    """log Q(shape, x): of a gamma distribution with scale 1, the share above x, however small."""
    q = float(torch.special.gammaincc(*torch.tensor([[shape], [x]], dtype=torch.float64)))
    if q > 1e-200:
        return math.log(q)
    # Lentz's method for the continued fraction, which far above the mean takes few terms.
    term = x + 1 - shape
    c, d = math.inf, 1 / term
    fraction = d
    for i in range(1, 10_000):
        a, term = -i * (i - shape), term + 2
        d, c = 1 / (a * d + term), term + a / c
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return shape * math.log(x) - x - math.lgamma(shape) + math.log(fraction)
