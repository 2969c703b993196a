"""Test images with and without the trigger, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

MAX_SHOWN = 6
MAX_SIDE = 128  # pixels; keeps the images of a report below a megabyte


class Outcome(NamedTuple):
    """One prediction: the name of its class, whether it is the true one, whether it is the attacker's."""

    name: str
    right: bool
    hit: bool


@dataclass(frozen=True, eq=False)
class Examples:
    """K test images with and without the trigger, and what the models say about them.

    Args:
        clean: [K, C, H, W] float in [0, 1], C = 1 or 3.
        triggered: The same images with the trigger, same shape.
        labels: K true classes.
        clean_before: K predictions of the original model, on `clean`.
        clean_after: K predictions of the purified model, on `clean`.
        triggered_before: K predictions of the original model, on `triggered`.
        triggered_after: K predictions of the purified model, on `triggered`.
        class_names: Names by class number.
        targets: The K classes that the attacker wants, if that is known.

    Raises:
        ValueError: Shapes or lengths differ, images leave [0, 1], or a class has no name.
    """

    clean: torch.Tensor
    triggered: torch.Tensor
    labels: Sequence[int]
    clean_before: Sequence[int]
    clean_after: Sequence[int]
    triggered_before: Sequence[int]
    triggered_after: Sequence[int]
    class_names: Sequence[str]
    targets: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("clean", "triggered"):
            self._check_images(name, getattr(self, name))
        if self.clean.shape != self.triggered.shape:
            raise ValueError(
                f"Examples: triggered: expected shape {tuple(self.clean.shape)} like clean, got "
                f"{tuple(self.triggered.shape)}; pass the same images with and without the trigger."
            )
        for name in ("labels", "clean_before", "clean_after", "triggered_before", "triggered_after", "targets"):
            if getattr(self, name) is not None:
                self._check_classes(name, getattr(self, name))

    def __len__(self) -> int:
        return len(self.clean)

    def outcomes(self, index: int) -> tuple[list[Outcome], list[Outcome]]:
        """What the two models, before and after, say about image `index`: without and with the trigger."""
        label = self.labels[index]
        target = None if self.targets is None else self.targets[index]

        def outcome(prediction: int, *, attacked: bool) -> Outcome:
            hit = attacked and prediction == target != label
            return Outcome(self.class_names[prediction], prediction == label, hit)

        return (
            [outcome(side[index], attacked=False) for side in (self.clean_before, self.clean_after)],
            [outcome(side[index], attacked=True) for side in (self.triggered_before, self.triggered_after)],
        )

    def tiles(self, limit: int = MAX_SHOWN) -> tuple[list[list[np.ndarray]], float]:
        """Clean, triggered and amplified difference of the first `limit` images, and the amplification.

        Returns:
            For each image three [H, W, 3] uint8 arrays with sides of at most 128 pixels; and the factor,
            one for all: 20, or less so that no difference leaves the range.
        """
        clean, triggered = (
            images[:limit].detach().float().cpu().clamp(0, 1) for images in (self.clean, self.triggered)
        )
        difference = (triggered - clean).abs()
        gain = 1 / max(difference.max().item(), 1 / 20)
        stacked = torch.stack([clean, triggered, difference * gain], dim=1).flatten(0, 1)
        shrink = MAX_SIDE / max(stacked.shape[-2:])
        if shrink < 1:
            size = [max(1, round(side * shrink)) for side in stacked.shape[-2:]]
            stacked = torch.nn.functional.interpolate(stacked, size=size, mode="area")
        pixels = (stacked.expand(-1, 3, -1, -1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        return [list(pixels[i : i + 3]) for i in range(0, len(pixels), 3)], gain

    @staticmethod
    def _check_images(name: str, images: torch.Tensor) -> None:
        if images.dim() != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
            raise ValueError(
                f"Examples: {name}: expected shape [K, C, H, W] with K, H, W >= 1 and C = 1 or 3, got "
                f"{tuple(images.shape)}; stack the images along dimension 0, channels before rows."
            )
        low, high = (bound.item() for bound in images.detach().float().aminmax())
        # Blending may leave the range by rounding, a normalised image leaves it by far; NaN fails too.
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(
                f"Examples: {name}: expected values in [0, 1], got {low:.3g} to {high:.3g}; pass the images before "
                "normalisation."
            )

    def _check_classes(self, name: str, classes: Sequence[int]) -> None:
        if len(classes) != len(self):
            raise ValueError(
                f"Examples: {name}: expected {len(self)} entries, one per image, got {len(classes)}; pass a list as "
                "long as clean."
            )
        for i, number in enumerate(classes):
            if not 0 <= number < len(self.class_names):
                raise ValueError(
                    f"Examples: {name}[{i}]: expected a class from 0 to {len(self.class_names) - 1}, got {number}; "
                    "give class_names one name for every class of the model."
                )
