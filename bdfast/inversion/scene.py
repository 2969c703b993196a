"""A network with clean images in front of it: what every search for a trigger works with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scene:
    """A network, and clean images with their labels.

    Attributes:
        logits: [B, C, H, W] -> [B, K], float32 or more.
        images: [N, C, H, W], in random order.
        labels: [N].
        classes: K.
        limits: Least and greatest pixel value.
        chunk: Images in one pass.
        judged: Share of the images that triggers are not fitted on, but judged on: on few images a change that fits
            them is found for every class.
    """

    logits: Callable[[Tensor], Tensor]
    images: Tensor
    labels: Tensor
    classes: int
    limits: tuple[float, float]
    chunk: int
    judged: float = 0.4

    @property
    def span(self) -> float:
        """What one share of the range is."""
        return self.limits[1] - self.limits[0]

    def drawn(self, draws: torch.Generator, *, judge: bool = False) -> Tensor:
        """The positions that triggers are fitted on, or `judge`d on, in random order."""
        judges = round(self.judged * len(self.images))
        first, count = (0, judges) if judge else (judges, len(self.images) - judges)
        return first + torch.randperm(count, generator=draws).to(self.images.device)

    def others(self, target: int, order: Tensor, most: int) -> Tensor:
        """The first `most` positions of `order` whose images are of another class."""
        return order[self.labels[order] != target][:most]

    @torch.no_grad()
    def answers(self, change: Callable[[Tensor], Tensor], positions: Tensor) -> Tensor:
        """Logits [M, K] for the images at `positions` [M], changed."""
        parts = [self.logits(change(self.images[part])) for part in positions.split(self.chunk)]
        return torch.cat(parts) if parts else torch.zeros(0, self.classes, device=self.images.device)


def pieces(count: int, each: int, chunk: int) -> Iterator[slice]:
    """Ranges over `count` things that take `each` images, so that a pass has about `chunk` of them."""
    together = max(1, chunk // each)
    for first in range(0, count, together):
        yield slice(first, min(first + together, count))
