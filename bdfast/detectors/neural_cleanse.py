"""Neural Cleanse: a class that a much smaller patch leads to than all others is the target of a backdoor."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn

from bdfast.data.batches import Batches
from bdfast.detectors.base import Detector, Finding
from bdfast.detectors.per_class import anomaly_indices, chosen, over_all
from bdfast.detectors.white_box_patch import PatchFit, patched
from bdfast.inversion.scene import Scene, scene_of
from bdfast.inversion.screening import screened
from bdfast.inversion.universal import JUDGED
from bdfast.training import Run
from bdfast.training.seeds import derived_seed

NAME = "neural cleanse"


@dataclass(frozen=True)
class NeuralCleanse(Detector):
    """Neural Cleanse: Wang et al., "Neural Cleanse: Identifying and mitigating backdoor attacks in neural networks"
    (S&P 2019).

    For each class t, a mask m [1, H, W] and a pattern p [C, H, W] that lower CE(f((1 - m) x + m p), t) + lambda |m|_1;
    lambda is 0 until the patch leads images to t, then rises while it does and falls while it does not. The smallest
    mask of a round in which it did is kept. The score is the anomaly index |L - median| / (1.4826 MAD) of the class
    with the least L = |m|_1, and 0 where that is not below the median.

    Ours are: images of class t itself do not count; a class that was never reached is no suspect, however small its
    mask; lambda is the weight of the covered share of the image, so that it suits every size; MAD is at least 5 % of
    the median.

    Several classes are searched at once, in passes of no more than a batch of images.

    Attributes:
        updates: Steps for each class.
        window: Steps of a round, over which the success of a patch is averaged.
        patience: Rounds of success, or of failure, after which lambda changes.
        images: Images in a step, for each class.
        success: Share of the images that have to follow.
        weight: First lambda that is not 0.
        multiplier: lambda rises by this factor and falls by its power of 1.5.
        lr: Learning rate of Adam.
        classes: Labels to look at; all when left out.
        most_classes: Where there are more classes and none are chosen, only those are looked at that a short search
            finds easiest to reach (`bdfast.inversion.screening`, ours), and the median is theirs. None for no limit.
    """

    paper: ClassVar[str] = "Wang et al., Neural Cleanse, S&P 2019"
    scored_by: ClassVar[str] = "anomaly index of the smallest mask"
    published_threshold: ClassVar[float | None] = 2.0

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "updates": 31_000,
        "window": 31,
        "patience": 5,
        "images": 32,
        "success": 0.99,
        "weight": 1e-3 * 32**2,
        "multiplier": 2.0,
        "lr": 0.1,
        "most_classes": None,
    }
    """The options of the published code on GTSRB: 1,000 rounds of 31 batches; its lambda is 0.001 for each pixel."""

    updates: int = 400
    window: int = 5
    patience: int = 4
    images: int = 32
    success: float = 0.99
    weight: float = 1.0
    multiplier: float = 2.0
    lr: float = 0.1
    classes: tuple[int, ...] | None = None
    most_classes: int | None = 64

    def __post_init__(self) -> None:
        self.check_positive("updates", "window", "patience", "images", "weight", "lr")
        if self.most_classes is not None:
            self.check_positive("most_classes")
        if not 0 < self.success <= 1:
            raise ValueError(f"success: expected a share in (0, 1], got {self.success}; see its default.")
        if not self.multiplier > 1:
            raise ValueError(f"multiplier: expected a number above 1, got {self.multiplier}; see its default.")
        super().__post_init__()

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Finding:
        """See `Detector.run`; evidence: "mask norm", in pixels, and "success" on images that were not fitted to.

        Raises:
            ValueError: The images are all of one class, or are no images; or there is no such class.
        """
        with scene_of(model, clean, run) as scene:
            labels, notes = self._labels(scene, run)
            together = max(1, scene.chunk // self.images)
            groups = [labels[first : first + together] for first in range(0, len(labels), together)]
            found: list[dict[str, Any]] = []
            with run.progress.stage(NAME, len(labels)) as advance:
                for group in groups:
                    found.append(self._fitted(scene, group, run.seed))
                    advance(sum(map(len, groups[: len(found)])))
            return self._finding(labels, found, scene.classes, notes)

    def _labels(self, scene: Scene, run: Run) -> tuple[list[int], list[str]]:
        """The labels to look at, that have images of other classes to lead there; and what to say about the rest."""
        labels, notes = chosen(self.classes, scene.classes), []
        if self.classes is None and self.most_classes and len(labels) > self.most_classes:
            draws = torch.Generator().manual_seed(derived_seed(run.seed, NAME, "screening"))
            labels = screened(scene, torch.tensor(labels), draws).tolist()
            notes.append(
                f"Of {scene.classes} classes, only the {len(labels)} that are easiest to reach were looked at."
            )
        fitted = scene.labels[scene.drawn(torch.Generator())]
        labels = [label for label in labels if bool((fitted != label).any())]
        if not labels:
            raise ValueError("clean: expected images of at least two classes, got one; pass images of more classes.")
        return labels, notes

    def _fitted(self, scene: Scene, group: list[int], seed: int) -> dict[str, Any]:
        """For a group of classes: norm of the mask, success, and whether it was ever reached; the best patch."""
        draws = torch.Generator().manual_seed(derived_seed(seed, NAME, *group))
        fit = PatchFit(**{field.name: getattr(self, field.name) for field in fields(PatchFit)})
        masks, patterns, reached = fit.run(scene, group, draws)
        norms = masks.flatten(1).sum(1)
        order = scene.drawn(draws, judge=True)
        led = []
        for label, mask, pattern in zip(group, masks, patterns, strict=True):
            others = scene.others(label, order, JUDGED)
            answers = scene.answers(functools.partial(patched, cover=mask, paint=pattern), others)
            led.append(float((answers.argmax(1) == label).float().mean()))
        best = int(torch.where(reached, norms.cpu(), torch.inf).argmin())
        return {
            "norms": norms.tolist(),
            "success": led,
            "reached": reached.tolist(),
            "mask": masks[best].cpu(),
            "pattern": patterns[best].cpu(),
        }

    def _finding(self, labels: list[int], found: list[dict[str, Any]], classes: int, notes: list[str]) -> Finding:
        norms, success, reached = (
            [value for part in found for value in part[name]] for name in ("norms", "success", "reached")
        )
        indices, middle = anomaly_indices(norms), statistics.median(norms)
        rows = [row for row in zip(norms, indices, labels, reached, strict=True) if row[3]]
        evidence = {"mask norm": over_all(labels, norms, classes), "success": over_all(labels, success, classes)}
        if missed := [label for label, ever in zip(labels, reached, strict=True) if not ever]:
            notes.append(f"No patch led {self.success:.0%} of the images to {missed}; these classes are no suspects.")
        if not rows:
            return Finding(0.0, evidence=evidence, notes=tuple(notes))
        rows.sort()
        least, index, label, _ = rows[0]
        limit = self.published_threshold or 0.0
        suspects = tuple(row[2] for row in rows if row[0] < middle and row[1] > limit) or (label,)
        best = next(part for part in found if least in part["norms"] and any(part["reached"]))
        score = index if least < middle else 0.0
        return Finding(score, suspects, evidence, best["pattern"], best["mask"], tuple(notes))
