"""The class that images are led to most easily, by one change for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bdfast.inversion.scene import Scene
from bdfast.inversion.screening import screened
from bdfast.inversion.universal import JUDGED, REACHED, START, lead

STEPS = 16
"""Steps of the search at each length."""

GROWTH = 1.5
"""Factor between lengths."""


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
        are of it, and, with more than 16 classes, for those that `screened` leaves out.
    """
    targets = screened(Scene(logits, images, labels, classes, limits, chunk), torch.arange(classes), generator)
    targets = targets.to(images.device)
    change = torch.zeros(len(targets), *images.shape[1:], device=images.device)
    length, found = START, False
    scene = Scene(logits, images, labels, classes, limits, chunk, judged=0)
    while True:
        lengths = torch.full((len(targets),), length, device=images.device)
        change = lead(scene, targets, change, lengths, generator, steps=STEPS)
        reached, loss = _reach(logits, targets, change, images, labels, limits, scene.drawn(generator))
        if found or length > 1.0:
            # NaN stands for a class whose images are the only ones: no other image can become one of it.
            evidence = loss.new_full((classes,), torch.inf)
            evidence[targets] = loss.nan_to_num(torch.inf)
            return {"target": int(evidence.argmin()), "evidence": evidence.tolist()}
        # Near the length that is just enough, weak triggers such as a small patch have not fully formed.
        found = float(reached.nan_to_num(0).max()) >= REACHED
        length *= GROWTH


@torch.no_grad()
def _reach(
    logits: Callable[[Tensor], Tensor],
    targets: Tensor,
    change: Tensor,
    images: Tensor,
    labels: Tensor,
    limits: tuple[float, float],
    order: Tensor,
) -> tuple[Tensor, Tensor]:
    reached, losses = [], []
    for target, own in zip(targets.tolist(), change, strict=True):
        others = order[labels[order] != target][:JUDGED]
        answers = logits((images[others] + own).clamp(*limits)).float()
        reached.append((answers.argmax(1) == target).float().mean())
        losses.append(F.cross_entropy(answers, torch.full_like(others, target)))
    return torch.stack(reached), torch.stack(losses)
