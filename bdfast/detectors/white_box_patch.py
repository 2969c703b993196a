"""Small patches that lead images to their classes, found with gradients: what Neural Cleanse does for each class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bdfast.inversion.scene import Scene

BETAS = (0.5, 0.9)
"""Of Adam, in the published code."""

DOWN = 1.5
"""The weight falls by `multiplier` to this power, in the published code."""

STALL = 5
"""A class ends after `patience` times so many rounds without a smaller patch, in the published code for GTSRB."""


@dataclass(frozen=True)
class PatchFit:
    """The search, with the options of `NeuralCleanse`."""

    updates: int
    window: int
    patience: int
    images: int
    success: float
    weight: float
    multiplier: float
    lr: float

    def run(self, scene: Scene, group: list[int], draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The smallest masks with success; where there was none, the last.

        Args:
            scene: Network and images; some are of another class than each of the group.
            group: T labels.
            draws: Draws images and starts.

        Returns:
            Masks [T, 1, H, W] in [0, 1], patterns [T, C, H, W] within the limits, and whether each had success [T].
        """
        device, (channels, *size) = scene.images.device, scene.images.shape[1:]
        dtype = torch.promote_types(scene.images.dtype, torch.float32)
        drawn = [torch.rand(len(group), count, *size, generator=draws, dtype=dtype) for count in (1, channels)]
        mask, pattern = ((2 * start - 1).atanh().to(device).requires_grad_() for start in drawn)
        optimizer = torch.optim.Adam([mask, pattern], lr=self.lr, betas=BETAS)
        balances = [Balance(self) for _ in group]
        masks, patterns = painted(mask.detach(), pattern.detach(), scene)
        for first in range(0, self.updates, self.window):
            length = min(self.window, self.updates - first)
            weights = torch.tensor([balance.weight for balance in balances], device=device, dtype=dtype)
            success, shares = torch.zeros(2, len(group), device=device, dtype=dtype)
            for _ in range(length):
                optimizer.zero_grad()
                cover, paint = painted(mask, pattern, scene)
                losses, hits = self._towards(scene, group, cover, paint, draws)
                share = cover.flatten(1).mean(1)
                (losses + weights * share).sum().backward()
                optimizer.step()
                success, shares = success + hits / length, shares + share.detach() / length
            rows = zip(balances, success.tolist(), shares.tolist(), strict=True)
            better = [balance.after(*row) or math.isinf(balance.least) for balance, *row in rows]
            taken = torch.tensor(better, device=device)[:, None, None, None]
            cover, paint = painted(mask.detach(), pattern.detach(), scene)
            masks, patterns = torch.where(taken, cover, masks), torch.where(taken, paint, patterns)
            if all(balance.stopped for balance in balances):
                break
        return masks, patterns, torch.tensor([balance.least < math.inf for balance in balances])

    def _towards(
        self, scene: Scene, group: list[int], cover: Tensor, paint: Tensor, draws: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The mean loss [T] towards each class, of images of other classes, and the share [T] that follows."""
        order = scene.drawn(draws)
        drawn = [scene.others(label, order, min(self.images, scene.chunk)) for label in group]
        count = min(map(len, drawn))
        x = scene.images[torch.stack([positions[:count] for positions in drawn])]
        logits = scene.logits(patched(x, cover[:, None], paint[:, None]).flatten(0, 1))
        targets = torch.tensor(group, device=logits.device).repeat_interleave(count)
        losses = F.cross_entropy(logits, targets, reduction="none").view(-1, count).mean(1)
        return losses, (logits.argmax(1) == targets).to(losses.dtype).view(-1, count).mean(1)


class Balance:
    """lambda of one class, moved by the success of its patch as in the published code."""

    def __init__(self, rule: PatchFit) -> None:
        self.rule = rule
        self.weight, self.least, self.stopped = 0.0, math.inf, False
        self._good = self._bad = self._ready = self._stalled = 0
        self._raised = self._lowered = False

    def after(self, success: float, norm: float) -> bool:
        """Take note of a round; whether its patch is the smallest so far that leads to the class."""
        if self.stopped:
            return False  # the others of its group go on
        rule, good = self.rule, success >= self.rule.success
        better = good and norm < self.least
        self.least = norm if better else self.least
        self._stalled = 0 if better or math.isinf(self.least) else self._stalled + 1
        self.stopped = self._raised and self._lowered and self._stalled >= STALL * rule.patience
        if self.stopped:
            return better
        self._ready = self._ready + 1 if good and self.weight == 0 else 0
        if self._ready >= rule.patience:
            self.weight, self._good, self._bad = rule.weight, 0, 0
            self._raised = self._lowered = False
        self._good, self._bad = (self._good + 1, 0) if good else (0, self._bad + 1)
        if self._good >= rule.patience:
            self.weight, self._good, self._raised = self.weight * rule.multiplier, 0, True
        elif self._bad >= rule.patience:
            self.weight, self._bad, self._lowered = self.weight / rule.multiplier**DOWN, 0, True
        return better


def patched(images: Tensor, cover: Tensor, paint: Tensor) -> Tensor:
    """(1 - cover) images + cover paint, in the dtype of the images."""
    return images.lerp(paint.expand_as(images).to(images.dtype), cover.to(images.dtype))


def painted(mask: Tensor, pattern: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
    """Mask and pattern from what is behind the tanh."""
    return mask.tanh() / 2 + 0.5, scene.limits[0] + scene.span * (pattern.tanh() / 2 + 0.5)
