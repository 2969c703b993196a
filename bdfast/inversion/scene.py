"""A network with clean images in front of it: what every search for a trigger works with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdfast.data.batches import Batch, Batches
from bdfast.task import at_least_float32
from bdfast.training import Run
from bdfast.training.modes import preserved_modes

MOST_IMAGES = 1000
"""Most images of a scene."""

ALL_TO_ALL = -1
"""In place of a target label: to any label but their own, as the triggers do that have a target for each label."""


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
        """The first `most` positions of `order` whose images are of another class than `target`."""
        return order[self.labels[order] != target][:most]

    def led(self, answers: Tensor, target: int, positions: Tensor) -> Tensor:
        """Whether answers [M] for the images at `positions` [M] are the target label; `ALL_TO_ALL`: not their own."""
        return answers != self.labels[positions] if target == ALL_TO_ALL else answers == target

    @torch.no_grad()
    def answers(self, change: Callable[[Tensor], Tensor], positions: Tensor) -> Tensor:
        """Logits [M, K] for the images at `positions` [M], changed."""
        parts = [self.logits(change(self.images[part])) for part in positions.split(self.chunk)]
        return torch.cat(parts) if parts else torch.zeros(0, self.classes, device=self.images.device)


def losses_towards(logits: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """What a trigger has to lower, for each image: the cross-entropy of its target label.

    For `ALL_TO_ALL`, how far the logit of its own label is above all others: the cross-entropy of its own label hardly
    has a gradient where the network is sure.

    Args:
        logits: [B, K].
        targets: [B].
        labels: [B].
    """
    own = labels.relu()[:, None]  # labels that do not count are negative
    ahead = logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).amax(1)
    return torch.where(targets == ALL_TO_ALL, ahead.relu(), F.cross_entropy(logits, targets.relu(), reduction="none"))


@contextmanager
def scene_of(network: nn.Module, clean: Batches, run: Run) -> Iterator[Scene]:
    """Inside, the network is in eval mode, its parameters need no gradient, and no pass leaves a trace in it.

    Args:
        network: The suspect network.
        clean: Batches of (images [B, C, H, W], labels); the first `MOST_IMAGES` are used.
        run: Seed, precision and `forward`.

    Raises:
        ValueError: The batches are something else.
    """
    images, labels, limits = gathered(clean, MOST_IMAGES)
    mixed = torch.randperm(len(images), generator=torch.Generator().manual_seed(run.seed)).to(images.device)

    def logits(x: Tensor) -> Tensor:
        with run.autocast(clean.device):
            passed = run.forward(network, (x, labels[:1].expand(len(x))))
        return at_least_float32(passed[0])

    with preserved_modes(network):
        network.eval().requires_grad_(False)
        with torch.no_grad():
            classes = logits(images[:1]).shape[1]
        yield Scene(logits, images[mixed], labels[mixed], classes, limits, clean.batch_size)


def holds_images(clean: Batches) -> bool:
    """Whether the batches are (images [B, C, H, W], labels [B], ...), which searches for triggers need."""
    return _pair(next(iter(clean.ordered()))) is not None


def _pair(batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Images and labels, which may be whole numbers of any type, and have a last dimension of one."""
    images, labels = batch[:2] if isinstance(batch, tuple | list) and len(batch) > 1 else (None, None)
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor) and images.ndim == 4):
        return None
    labels = labels.squeeze(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    return (images, labels.long()) if labels.ndim == 1 else None


def pixel_limits(clean: Batches) -> tuple[float, float]:
    """Least and greatest value of all images, one batch at a time.

    Raises:
        ValueError: The batches are not (images, labels, ...).
    """
    ends = [(float(images.min()), float(images.max())) for images, _ in _pairs(clean)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def gathered(clean: Batches, most: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The images [N, C, H, W] and labels [N] of the first batches that hold `most`, and least and greatest value.

    Where these are one class after the other, as in folders, `most` images drawn from all: the first would have few of
    the classes.

    Raises:
        ValueError: The batches are not (images, labels, ...).
    """
    images, labels = _first(clean, most)
    if len(images) < len(clean) and _grouped(labels):
        drawn = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))[:most]
        images, labels = _first(clean.part(drawn.sort().values), most)
    return images, labels, (float(images.min()), float(images.max()))


def _grouped(labels: Tensor) -> bool:
    """Whether labels [N] come one class after the other: about as many changes as there are classes."""
    return int((labels[1:] != labels[:-1]).sum()) < 2 * len(labels.unique())


def _first(clean: Batches, most: int) -> tuple[Tensor, Tensor]:
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for pair in _pairs(clean):
        images.append(pair[0])
        labels.append(pair[1])
        if sum(map(len, images)) >= most:
            break
    return torch.cat(images), torch.cat(labels)


def _pairs(clean: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in clean.ordered():
        pair = _pair(batch)
        if pair is None:
            raise ValueError(
                f"{clean.name}: expected batches of (images [B, C, H, W], labels), got {type(batch).__name__}; trigger "
                "inversion changes pixels, so give images by themselves."
            )
        yield pair


def pieces(count: int, each: int, chunk: int) -> Iterator[slice]:
    """Ranges over `count` things that take `each` images, so that a pass has about `chunk` of them."""
    together = max(1, chunk // each)
    for first in range(0, count, together):
        yield slice(first, min(first + together, count))
