"""A small patch that leads images to a class: a mask and a pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from bdfast.inversion.scene import Scene, losses_towards

STEPS = 120
LR = 0.1
PER_STEP = 64
COVERED = -2.0
"""Logit of the mask in the beginning."""


def fit_patch(scene: Scene, target: int, weight: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Wang et al., "Neural Cleanse" (S&P 2019): x' = (1 - m) x + m p, with as little of the mask m as possible.

    Args:
        scene: Network and images.
        target: The class, or `ALL_TO_ALL`.
        weight: Of the mean of the mask, beside the loss.
        draws: Draws the images and the start.

    Returns:
        The mask [1, H, W] in [0, 1] and the pattern [C, H, W] within the limits.
    """
    shape = scene.images.shape[1:]
    mask = torch.full((1, *shape[1:]), COVERED, device=scene.images.device).requires_grad_()
    pattern = torch.randn(shape, generator=draws).to(scene.images.device).requires_grad_()
    optimizer = torch.optim.Adam([mask, pattern], lr=LR)
    for _ in range(STEPS):
        drawn = scene.others(target, scene.drawn(draws), PER_STEP)
        optimizer.zero_grad()
        cover, paint = _drawn(mask, pattern, scene)
        answers = scene.logits(scene.images[drawn].lerp(paint.expand(len(drawn), *shape), cover))
        losses = losses_towards(answers, torch.full_like(drawn, target), scene.labels[drawn])
        (losses.mean() + weight * cover.mean()).backward()
        optimizer.step()
    return _drawn(mask.detach(), pattern.detach(), scene)


def _drawn(mask: Tensor, pattern: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
    paint = scene.limits[0] + torch.sigmoid(pattern) * scene.span
    return torch.sigmoid(mask).to(scene.images.dtype), paint.to(scene.images.dtype)
