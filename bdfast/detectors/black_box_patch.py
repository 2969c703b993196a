"""A small patch that leads images to a class, found from predictions alone: what B3D does for each class."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bdfast.detectors import nes
from bdfast.detectors.base import Predict

Losses = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images [B, C, H, W] in [0, 1] and labels [B] -> cross-entropy [B], and whether they are taken for that label [B]."""

WINDOW = 10
"""Steps over which the success of a patch is averaged."""

UP, DOWN = 1.2, 0.8
"""Factors of lambda, after a step with success and without."""

NEAR = 0.05
"""How far from 1 probabilities may add up to: services round them."""

LEAST, MOST = 1e-3, 1e4
"""Bounds of lambda, as multiples of the first; those of public implementations, which start at 0.01."""


@dataclass(frozen=True)
class Patch:
    """What was found for one class: mask [1 or C, H, W] and pattern [C, H, W], both in [0, 1]."""

    mask: Tensor
    pattern: Tensor
    success: float
    """Share of the predictions, in the steps around it."""
    reached: bool


@dataclass(frozen=True)
class PatchSearch:
    """The search, with the options of `B3D`; `batch_size` is the most images that are asked for at a time."""

    steps: int
    probes: int
    images: int
    sigma: float
    lr: float
    weight: float
    success: float
    start: float
    shared_mask: bool
    plain: bool
    batch_size: int

    def run(self, losses: Losses, images: Tensor, label: int, draws: torch.Generator) -> Patch:
        """The smallest mask with success; where there was none, the last.

        Args:
            losses: The black box.
            images: [N, C, H, W] in [0, 1], of other classes.
            label: Of the class.
            draws: Draws images, masks and patterns.
        """
        shape = images.shape[1:]
        mask = images.new_full((1, *shape[1:]) if self.shared_mask else shape, math.atanh(2 * self.start - 1))
        pattern = images.new_zeros(shape)
        optimizers = [torch.optim.Adam([z], lr=self.lr) for z in (mask, pattern)]
        weight, recent = self.weight, deque[float](maxlen=WINDOW)
        best, least = Patch(share_of(mask), share_of(pattern), 0.0, reached=False), math.inf
        count = min(self.images, len(images), self.batch_size)
        for _ in range(self.steps):
            x = images[torch.randperm(len(images), generator=draws)[:count].to(images.device)]
            mask.grad, pattern.grad, followed = self.gradients(losses, x, label, mask, pattern, weight, draws)
            recent.append(followed)
            average = sum(recent) / len(recent)
            cover = share_of(mask)
            norm = float(cover.sum())
            reached = len(recent) == WINDOW and average >= self.success
            if (reached and norm < least) or math.isinf(least):
                best, least = Patch(cover, share_of(pattern), average, reached), norm if reached else math.inf
            if len(recent) == WINDOW:
                weight = min(max(weight * (UP if reached else DOWN), LEAST * self.weight), MOST * self.weight)
            for optimizer in optimizers:
                optimizer.step()
        return best

    def gradients(
        self,
        losses: Losses,
        x: Tensor,
        label: int,
        mask: Tensor,
        pattern: Tensor,
        weight: float,
        draws: torch.Generator,
    ) -> tuple[Tensor, Tensor, float]:
        """Those by `mask` and `pattern`, before g, and the share of the predictions that were `label`."""
        cover, paint = share_of(mask), share_of(pattern)
        hits: list[float] = []

        def put_on(covers: Tensor, paints: Tensor) -> Tensor:
            """F [n] of n masks or n patterns."""
            size = max(len(covers), len(paints))
            triggered = x + covers[:, None] * (paints[:, None] - x)
            labels = torch.full((size * len(x),), label, device=x.device)
            values, led = losses(triggered.flatten(0, 1), labels)
            hits.append(float(led.float().mean()) * size)
            penalty = weight * covers.flatten(1).mean(1) if self.plain else 0.0
            return values.view(size, -1).mean(1) + penalty

        at_once = max(1, self.batch_size // len(x))
        by_mask = nes.gradient(
            nes.bernoulli(cover, draws),
            lambda covers: put_on(covers, paint[None]),
            self.probes,
            at_once,
            baseline=not self.plain,
        )
        if not self.plain:
            by_mask += weight * 2 * cover * (1 - cover) / cover.numel()
        by_pattern = nes.gradient(
            nes.gaussian(pattern, self.sigma, draws),
            lambda z: put_on(cover[None], share_of(z)),
            self.probes,
            at_once,
            baseline=not self.plain,
        )
        return by_mask, by_pattern, sum(hits) / (2 * self.probes)


def asked(predict: Predict, first: Tensor, limits: tuple[float, float]) -> tuple[Losses, int]:
    """The losses by what a black box answers, and its number of classes K.

    Args:
        predict: See `Predict`; its answers may be on another device, and of another dtype.
        first: Images [B, C, H, W], for which its values are checked; they tell the dtype that it takes.
        limits: The pixel values that are 0 and 1 for the losses.

    Raises:
        ValueError: The answers are no probabilities; for later images by their shape alone.
    """
    low, high = limits
    count = _answers(predict, first, whole=True).shape[1]

    def losses(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        chances = _answers(predict, (low + (high - low) * x).to(first.dtype)).to(x)
        own = chances.gather(1, labels[:, None])[:, 0]
        return -own.clamp_min(torch.finfo(x.dtype).tiny).log(), chances.argmax(1) == labels

    return losses, count


def _answers(predict: Predict, images: Tensor, *, whole: bool = False) -> Tensor:
    """Probabilities [B, K] as they came; `whole`: their values are looked at, too."""
    answers: object = predict(images)
    got = type(answers).__name__
    if isinstance(answers, Tensor):
        got = f"a tensor {list(answers.shape)}"
        if answers.ndim == 2 and len(answers) == len(images) and answers.numel():
            if not whole:
                return answers
            least, sums = float(answers.min()), answers.double().sum(1)
            if least >= 0 and bool(((sums - 1).abs() <= NEAR).all()):
                return answers
            got += f" with values from {least:.3g} to {float(answers.max()):.3g}, where the first row adds up to "
            got += f"{float(sums[0]):.3g}"
    raise ValueError(
        f"model: expected probabilities [B, K] in [0, 1] that add up to 1, as a tensor, for B = {len(images)} images, "
        f"got {got}; pass softmax(logits)."
    )


def share_of(z: Tensor) -> Tensor:
    """g of the paper."""
    return (z.tanh() + 1) / 2


def noise_images(
    losses: Losses,
    shape: torch.Size,
    labels: Tensor,
    draws: torch.Generator,
    *,
    steps: int,
    probes: int,
    sigma: float,
    lr: float,
    baseline: bool,
    batch_size: int,
) -> Tensor:
    """Images [N, C, H, W] in [0, 1] that are led from noise to `labels` [N], for B3D without clean images.

    x <- x - lr times the mean of CE(f(x + sigma e), t) e / sigma, cut to [0, 1], within f, too.
    """
    made = []
    for part in labels.split(batch_size):
        x = torch.rand(len(part), *shape, generator=draws).to(labels.device)

        def values(probed: Tensor, wanted: Tensor = part) -> Tensor:
            count = len(probed)
            return losses(probed.clamp(0, 1).flatten(0, 1), wanted.repeat(count))[0].view(count, -1)

        at_once = max(1, batch_size // len(part))
        for _ in range(steps):
            by_x = nes.gradient(nes.gaussian(x, sigma, draws), values, probes, at_once, baseline=baseline)
            x = (x - lr * by_x).clamp(0, 1)
        made.append(x)
    return torch.cat(made)
