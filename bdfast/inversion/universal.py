"""One change for all images: the search for the shortest that leads them to a class."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bdfast.inversion.scene import ALL_TO_ALL, Scene, losses_towards, pieces

START = 0.03
"""First length: root mean square of a pixel's change, as a share of the range."""

GROWTH = 1.25
"""Factor between lengths."""

STEPS = 8
"""Steps of the search at each length."""

REACHED = 0.9
"""Share of the images that have to follow."""

PER_STEP = 40
"""Images in a step, for each change."""

JUDGED = 120
"""Images on which a change is measured."""

PACE = 0.3
"""First step at a length, as a share of it; the steps fall to zero."""

TINY = 1e-20


def lead(
    scene: Scene,
    targets: Tensor,
    changes: Tensor,
    lengths: Tensor,
    draws: torch.Generator,
    *,
    steps: int = STEPS,
    images: int = PER_STEP,
    windows: Tensor | None = None,
) -> Tensor:
    """Move changes [T, C, H, W] so that images follow them to `targets` [T]; none gets longer than `lengths` [T].

    Normalised steps of gradient descent in an L2 ball (Moosavi-Dezfooli et al., "Universal adversarial perturbations",
    CVPR 2017).

    Args:
        scene: Network and images.
        targets: [T], labels or `ALL_TO_ALL`.
        changes: Where to start.
        lengths: [T], root mean square of a pixel's change, as a share of the range.
        draws: Draws the images.
        steps: How many.
        images: Images in a step, for each change.
        windows: [T, 1, H, W], 1 where a change may be other than zero and 0 elsewhere; everywhere when left out.
    """
    radius = (lengths * scene.span * changes[0].numel() ** 0.5).view(-1, 1, 1, 1).to(changes)
    for step in range(steps):
        drawn = scene.drawn(draws)[:images]
        gradient = gradient_towards(scene, targets, changes, drawn)
        if windows is not None:
            gradient = gradient * windows
        changes = stepped(changes, gradient, radius, PACE * (1 - step / steps))
    return changes


def stepped(changes: Tensor, gradient: Tensor, radius: Tensor | float, pace: float) -> Tensor:
    """One step down the gradient, `pace` times the radius long, and back into the ball: [T, C, H, W]."""
    changes = changes - pace * radius * gradient / norms(gradient).clamp_min(TINY)
    return changes * (radius / norms(changes).clamp_min(TINY)).clamp(max=1)


def followed(scene: Scene, targets: Tensor, changes: Tensor, order: Tensor) -> Tensor:
    """The share [T] of images of other classes that a change leads to its target; NaN where there are none.

    For `ALL_TO_ALL`, of the images that the network gets right.

    Args:
        scene: Network and images.
        targets: [T], labels or `ALL_TO_ALL`.
        changes: [T, C, H, W].
        order: Positions of the images, of which the first `JUDGED` count.
    """
    rates = []
    for target, change in zip(targets.tolist(), changes, strict=True):
        positions = scene.others(target, order, JUDGED)
        answers = scene.answers(functools.partial(_changed, change=change, limits=scene.limits), positions)
        led = scene.led(answers.argmax(1), target, positions).float().mean()
        if target == ALL_TO_ALL:  # images that the network gets wrong are away already
            chance = scene.led(scene.answers(lambda x: x, positions).argmax(1), target, positions).float().mean()
            led = (led - chance) / (1 - chance)
        rates.append(led)
    return torch.stack(rates)


def _changed(images: Tensor, change: Tensor, limits: tuple[float, float]) -> Tensor:
    return (images + change).clamp(*limits)


def gradient_towards(scene: Scene, targets: Tensor, changes: Tensor, drawn: Tensor) -> Tensor:
    """Gradient [T, C, H, W] of the loss of images at `drawn` [N], with each change, towards its target."""
    parts = pieces(len(changes), max(1, len(drawn)), scene.chunk)
    return torch.cat([_gradient(scene, targets[part], changes[part], drawn) for part in parts])


def _gradient(scene: Scene, targets: Tensor, changes: Tensor, drawn: Tensor) -> Tensor:
    changes = changes.detach().requires_grad_()
    x = (scene.images[drawn] + changes[:, None]).clamp(*scene.limits).flatten(0, 1)
    wanted, labels = targets.repeat_interleave(len(drawn)), scene.labels[drawn].repeat(len(changes))
    losses = losses_towards(scene.logits(x), wanted, labels)
    # Skip images that already belong to the class.
    return torch.autograd.grad(losses[labels != wanted].sum(), changes)[0]


def norms(x: Tensor) -> Tensor:
    """Euclidean, of each change [T, ...]: [T, 1, 1, 1]."""
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
