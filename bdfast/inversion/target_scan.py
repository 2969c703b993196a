"""The class that images are led to most easily, by one change for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = 16
"""Steps of the search at each length."""

GROWTH = 1.5
"""Factor between lengths."""

START = 0.03
"""First length: root mean square of a pixel's change, as a share of the range."""

REACHED = 0.9
"""Share of the images that have to follow for the next length to be the last."""

PER_CLASS = 40
"""Images in a step, for each class."""

JUDGED = 120
"""Images on which a change is measured."""

TINY = 1e-20


def easiest_class(
    logits: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    limits: tuple[float, float],
    chunk: int,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Search for every class the one change of given length that leads most images there; lengthen until one does.

    A backdoor is a short way to its target for all images at once (Wang et al., "Neural Cleanse", S&P 2019), so the
    class that is reached with the least loss is the suspect. One change for each class, descended by normalised steps
    in an L2 ball (Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017).

    Args:
        logits: [B, C, H, W] -> [B, K].
        images: [N, C, H, W], clean.
        labels: [N].
        classes: K.
        limits: Least and greatest pixel value.
        chunk: Images in one pass.
        generator: Draws the images.

    Returns:
        "target", the class, and "evidence", [K]: the loss that is left for every class, infinite where all images
        are of it.
    """
    shape = images.shape[1:]
    span = limits[1] - limits[0]
    change = torch.zeros(classes, *shape, device=images.device)
    length, longest = (share * span * shape.numel() ** 0.5 for share in (START, 1.0))
    together = max(1, chunk // PER_CLASS)
    found = False

    def draw() -> Tensor:
        return torch.randperm(len(images), generator=generator).to(images.device)

    while True:
        for step in range(STEPS):
            drawn = draw()[:PER_CLASS]
            parts = enumerate(change.split(together))
            gradient = torch.cat(
                [_gradient(logits, part, images[drawn], labels[drawn], limits, i * together) for i, part in parts]
            )
            pace = 0.3 * length * (1 - step / STEPS)
            change = change - pace * gradient / _lengths(gradient).clamp_min(TINY)
            change *= (length / _lengths(change).clamp_min(TINY)).clamp(max=1)
        reached, loss = _reach(logits, change, images, labels, limits, draw())
        if found or length > longest:
            # NaN stands for a class whose images are the only ones: no other image can become one of it.
            loss = loss.nan_to_num(torch.inf)
            return {"target": int(loss.argmin()), "evidence": loss.tolist()}
        # Near the length that is just enough, weak triggers such as a small patch have not fully formed.
        found = float(reached.nan_to_num(0).max()) >= REACHED
        length *= GROWTH


def _gradient(
    logits: Callable[[Tensor], Tensor],
    change: Tensor,
    images: Tensor,
    labels: Tensor,
    limits: tuple[float, float],
    first: int,
) -> Tensor:
    change = change.detach().requires_grad_()
    x = (images + change[:, None]).clamp(*limits).flatten(0, 1)
    targets = torch.arange(first, first + len(change), device=x.device).repeat_interleave(len(images))
    losses = F.cross_entropy(logits(x).float(), targets, reduction="none")
    # Skip images that already belong to the class.
    return torch.autograd.grad(losses[labels.repeat(len(change)) != targets].sum(), change)[0]


@torch.no_grad()
def _reach(
    logits: Callable[[Tensor], Tensor],
    change: Tensor,
    images: Tensor,
    labels: Tensor,
    limits: tuple[float, float],
    order: Tensor,
) -> tuple[Tensor, Tensor]:
    reached, losses = [], []
    for target, own in enumerate(change):
        others = order[labels[order] != target][:JUDGED]
        answers = logits((images[others] + own).clamp(*limits)).float()
        reached.append((answers.argmax(1) == target).float().mean())
        losses.append(F.cross_entropy(answers, torch.full_like(others, target)))
    return torch.stack(reached), torch.stack(losses)


def _lengths(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
