"""Surrogate triggers: what the trigger of a network may be, guessed from the network and clean images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bdfast.inversion.least_length import LeastLengths, least_lengths
from bdfast.inversion.patches import fit_patch
from bdfast.inversion.scene import Scene
from bdfast.inversion.universal import lead

FACTORS = (1.0, 1.5)
"""Lengths of the dense changes, as multiples of the least length of their class."""

SEEDS = 2
"""Dense changes of each length."""

AREA_WEIGHTS = (100.0, 300.0)
"""Weights of the area of the patches: so large that patches cover about a hundredth of the image.

Larger ones lead to a class in clean networks too, and so tell nothing about a backdoor.
"""

PATCHED, BESIDE = 0.8, 0.6
"""Where the smallest patch towards one suspect leads that many images there, suspects with less than this share of it
are dropped. On the demo's network the patch of the true target led twice as many as those of its two neighbours."""

REFINED = 24
"""Steps in which a dense change is fitted to its length."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """One guess: x' = x + weight (paint - x) for a patch, x' = clip(x + paint) for a dense change.

    Attributes:
        target: The class that it leads to.
        paint: [C, H, W].
        weight: [1, H, W] in [0, 1]; None for a dense change.
        limits: Least and greatest pixel value.
        kind: "dense 1", "dense 1.5" or "patch".
    """

    target: int
    paint: Tensor
    weight: Tensor | None
    limits: tuple[float, float]
    kind: str

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> with the trigger."""
        if self.weight is None:
            return (images + self.paint).clamp(*self.limits)
        return images.lerp(self.paint.expand_as(images), self.weight)


@dataclass(frozen=True, eq=False)
class Surrogates:
    """Guesses for every class that may be the target.

    Attributes:
        lengths: What it takes to lead images to each class.
        targets: The classes; none where no class stands out.
        triggers: The guesses, several for each of them.
        clear: Whether the targets are clearly easier to reach than all other classes.
    """

    lengths: LeastLengths
    targets: list[int]
    triggers: tuple[Surrogate, ...]
    clear: bool

    def rates(self, scene: Scene) -> list[float]:
        """For each trigger, how much more often images of other classes get its target with it than without.

        0 is what happens without it, and 1 is always. NaN where there are no images of other classes.
        """
        order = torch.arange(len(scene.images), device=scene.images.device)
        plain = scene.answers(lambda x: x, order).argmax(1)
        found = []
        for trigger in self.triggers:
            others = scene.labels != trigger.target
            led = (scene.answers(trigger, order[others]).argmax(1) == trigger.target).float().mean()
            chance = (plain[others] == trigger.target).float().mean()
            found.append(float(((led - chance) / (1 - chance)).clamp(min=0)))
        return found

    def residual(self, scene: Scene) -> float:
        """The largest of `rates` among kinds of triggers, of each kind the least; 0 without triggers.

        A single one may lead to its class by what belongs to that class in clean networks too, and goes on doing so.
        """
        kinds: dict[tuple[int, str], list[float]] = {}
        for trigger, rate in zip(self.triggers, self.rates(scene), strict=True):
            if rate == rate:  # not NaN
                kinds.setdefault((trigger.target, trigger.kind), []).append(rate)
        return max(map(min, kinds.values()), default=0.0)


def find_surrogates(scene: Scene, draws: torch.Generator, *, targets: list[int] | None = None) -> Surrogates:
    """Guess triggers of several kinds towards every suspect class, or towards `targets`.

    What tells a backdoor that is left from one that is gone is the largest rate of several kinds: a dense change may
    have lost its effect where a patch still has it.
    """
    lengths = least_lengths(scene, draws, among=targets)
    suspects = lengths.suspects if targets is None else targets
    triggers = tuple(trigger for target in suspects for trigger in _towards(scene, target, lengths, draws))
    found = Surrogates(lengths, suspects, triggers, targets is not None or lengths.clear)
    return found if found.clear else _by_patches(found, scene)


def _by_patches(found: Surrogates, scene: Scene) -> Surrogates:
    """Of suspects that lie near each other, those alone that a patch leads to far better than to the others."""
    least: dict[int, float] = {}
    for trigger, rate in zip(found.triggers, found.rates(scene), strict=True):
        if trigger.weight is not None:
            least[trigger.target] = min(rate, least.get(trigger.target, 1.0))
    best = max(least.values(), default=0.0)
    kept = [target for target in found.targets if least[target] >= BESIDE * best]
    if best < PATCHED or kept == found.targets:
        return found
    triggers = tuple(trigger for trigger in found.triggers if trigger.target in kept)
    return replace(found, targets=kept, triggers=triggers, clear=True)


def _towards(scene: Scene, target: int, lengths: LeastLengths, draws: torch.Generator) -> Iterator[Surrogate]:
    device = scene.images.device
    least = float(lengths.lengths[target].clamp(max=1.0))
    reach = torch.tensor([min(1.0, least * factor) for factor in FACTORS for _ in range(SEEDS)], device=device)
    start = torch.randn(len(reach), *scene.images.shape[1:], generator=draws).to(device)
    changes = lead(scene, torch.full((len(reach),), target, device=device), start, reach, draws, steps=REFINED)
    names = [f"dense {factor:g}" for factor in FACTORS for _ in range(SEEDS)]
    for change, name in zip(changes, names, strict=True):
        yield Surrogate(target, change, None, scene.limits, name)
    for weight in AREA_WEIGHTS:
        cover, paint = fit_patch(scene, target, weight, draws)
        yield Surrogate(target, paint, cover, scene.limits, "patch")
