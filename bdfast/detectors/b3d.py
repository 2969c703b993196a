"""B3D: Neural Cleanse for a network that only gives probabilities away."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bdfast.data.batches import Batches
from bdfast.detectors.base import BlackBox, Finding, Predict
from bdfast.detectors.black_box_patch import Losses, Patch, PatchSearch, asked, noise_images
from bdfast.detectors.per_class import anomaly_indices, chosen, over_all
from bdfast.inversion.scene import MOST_IMAGES, gathered
from bdfast.training import Run
from bdfast.training.seeds import derived_seed

NAME = "b3d"

LEAST_NORM = 1e-6
"""Masks with a smaller norm cover nothing, and the score is that of this one, so that it stays finite."""


@dataclass(frozen=True)
class B3D(BlackBox):
    """B3D: Dong et al., "Black-box detection of backdoor attacks with limited information and data" (ICCV 2021).

    For each class t, a mask and a pattern that lower F(m, p) = CE(f((1 - m) x + m p), t) + lambda |m|_1, by predictions
    alone. With g(z) = (tanh(z) + 1) / 2, m is Bernoulli(g(z_m)), and p = g(z_p + sigma e) with e normal. From k samples
    of each, the gradient by z_m is the mean of F(m_j, g(z_p)) 2 (m_j - g(z_m)), the one by z_p the mean of
    F(g(z_m), p_j) e_j / sigma; an Adam for each. The score is the median of |g(z_m)|_1 over all classes, divided by the
    least; published is that a backdoor has a norm below a quarter of the median.

    How lambda moves is that of public implementations: after ten steps it rises by a fifth where 99 % of the
    predictions of the last ten are t, and else falls by a fifth.

    Ours are: less noise in the gradients (`plain` for those above), the start, that clean images of class t itself do
    not count, as in Neural Cleanse, and that of each class the smallest mask with success counts, and classes without
    any are no suspects.

    Memory: no more than a batch of `clean` is asked for at a time, and beside it there are only the masks or patterns
    of that batch, and three copies of the 1,000 first images. Time: 2 x steps x probes x images predictions for each
    class, which is 1.6 million for ten classes, and as published 128 million; noise adds probes x noise_steps for each
    of its images.

    Attributes:
        steps: For each class.
        probes: k, samples of the mask, and of the pattern, in a step.
        images: Images that each sample is put on.
        sigma: Width of the samples of the pattern.
        lr: Learning rate of both Adams.
        weight: First lambda, for the covered share of the image.
        success: Share of the predictions that makes lambda rise.
        start: What share of the image the mask covers in the beginning.
        shared_mask: One mask [1, H, W] for all channels, as in Neural Cleanse, in place of one for each.
        plain: The gradients as above; else the mean loss of the other samples is taken away from each, and the
            gradient of lambda |m|_1 is the exact one. Both have the same mean.
        source: "clean" images, or for B3D-SS "noise": random images that are led to each class in turn by the same
            kind of gradients; of the clean ones only shape and range are used.
        noise_images: Such images for each class; at most 1,000 in all.
        noise_steps: Steps for these.
        classes: Labels to look at; all when left out.
    """

    paper: ClassVar[str] = "Dong et al., B3D, ICCV 2021"
    scored_by: ClassVar[str] = "median mask norm over the least"
    published_threshold: ClassVar[float | None] = 4.0

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "steps": 1000,
        "probes": 50,
        "images": 128,
        "sigma": 0.1,
        "lr": 0.05,
        "weight": 0.01 * 3 * 32**2,
        "plain": True,
        "noise_images": 100,
        "noise_steps": 500,
    }
    """sigma, lr and probes of the paper; the rest are those of public implementations for images [3, 32, 32], since
    the official repository is empty."""

    steps: int = 500
    probes: int = 20
    images: int = 8
    sigma: float = 0.1
    lr: float = 0.05
    weight: float = 1.0
    success: float = 0.99
    start: float = 0.1
    shared_mask: bool = False
    plain: bool = False
    source: Literal["clean", "noise"] = "clean"
    noise_images: int = 8
    noise_steps: int = 40
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.check_positive("steps", "images", "sigma", "lr", "weight", "noise_images", "noise_steps")
        if not self.probes >= 2:
            raise ValueError(f"probes: expected at least 2, got {self.probes}; see its default.")
        for name in ("success", "start"):
            if not 0 < (share := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected a share in (0, 1), got {share}; see its default.")
        self.check_one_of("source", "clean", "noise")
        super().__post_init__()

    @torch.no_grad()
    def query(self, predict: Predict, clean: Batches, run: Run) -> Finding:
        """See `BlackBox.query`; evidence: "mask norm", in values of the image, and "success" of that mask.

        Raises:
            ValueError: The images all have one pixel value or one class, or are no images; or the answers are no
                probabilities.
        """
        given, own, (low, high) = gathered(clean, MOST_IMAGES)
        if not high > low:
            raise ValueError(
                f"{clean.name}: expected images of more than one pixel value, got {low}; pass other images."
            )
        images = (given.to(torch.promote_types(given.dtype, torch.float32)) - low) / (high - low)
        losses, count = asked(predict, given[: clean.batch_size], (low, high))
        labels = chosen(self.classes, count)
        if self.source == "noise":
            images = self._noise(losses, images, count, clean.batch_size, run.seed).to(images)
            own = torch.full((len(images),), -1, device=images.device)
        if not (labels := [label for label in labels if bool((own != label).any())]):
            raise ValueError(
                f"{clean.name}: expected images of at least two classes among the first {len(given)}, got one; pass "
                "images of more classes, in random order."
            )
        found: list[tuple[float, float, bool]] = []
        best, least = None, math.inf
        with run.progress.stage(NAME, len(labels)) as advance:
            for label in labels:
                patch = self._fitted(losses, images[own != label], label, clean.batch_size, run.seed)
                norm = float(patch.mask.sum())
                if patch.reached and norm < least:
                    best, least = patch, norm
                found.append((norm, patch.success, patch.reached))
                advance(len(found))
        finding = self._finding(labels, found, count)
        if best is None:
            return finding
        return replace(finding, trigger=low + (high - low) * best.pattern.cpu(), mask=best.mask.cpu())

    def _noise(self, losses: Losses, images: Tensor, count: int, batch_size: int, seed: int) -> Tensor:
        draws = torch.Generator().manual_seed(derived_seed(seed, NAME, "noise"))
        labels = torch.arange(min(MOST_IMAGES, count * self.noise_images), device=images.device) % count
        return noise_images(
            losses,
            images.shape[1:],
            labels,
            draws,
            steps=self.noise_steps,
            probes=self.probes,
            sigma=self.sigma,
            lr=self.lr,
            baseline=not self.plain,
            batch_size=batch_size,
        )

    def _fitted(self, losses: Losses, images: Tensor, label: int, batch_size: int, seed: int) -> Patch:
        options = {field.name: getattr(self, field.name) for field in fields(PatchSearch) if hasattr(self, field.name)}
        draws = torch.Generator().manual_seed(derived_seed(seed, NAME, label))
        return PatchSearch(**options, batch_size=batch_size).run(losses, images, label, draws)

    def _finding(self, labels: list[int], found: list[tuple[float, float, bool]], count: int) -> Finding:
        norms, success = [norm for norm, _, _ in found], [share for _, share, _ in found]
        middle, indices = statistics.median(norms), anomaly_indices(norms)
        evidence = {"mask norm": over_all(labels, norms, count), "success": over_all(labels, success, count)}
        order = sorted((place for place in range(len(found)) if found[place][2]), key=norms.__getitem__)
        notes = []
        if missed := [label for label, (_, _, reached) in zip(labels, found, strict=True) if not reached]:
            notes.append(f"No patch led {self.success:.0%} of the images to {missed}; these classes are no suspects.")
        if not order:
            return Finding(0.0, evidence=evidence, notes=tuple(notes))
        least = order[0]
        limit = self.published_threshold or 0.0
        suspects = [labels[place] for place in order if limit * norms[place] < middle] or [labels[least]]
        notes.append(f"The anomaly index of the smallest mask is {indices[least]:.1f}.")
        score = max(middle, LEAST_NORM) / max(norms[least], LEAST_NORM)
        return Finding(score, tuple(suspects), evidence, notes=tuple(notes))
