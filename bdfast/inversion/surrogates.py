"""Surrogate triggers: what the trigger of a network may be, guessed from the network and clean images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bdfast.inversion.least_length import GAP, LeastLengths, least_lengths
from bdfast.inversion.opening import opened
from bdfast.inversion.patches import fit_patch
from bdfast.inversion.scene import Scene, scene_of
from bdfast.inversion.universal import lead
from bdfast.task import Forward, default_forward
from bdfast.training.seeds import derived_seed

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

LED = 0.5
"""What a patch has to lead to a class that is not `FAR` easier than the next: in clean networks some class is easier,
too, but small patches hardly lead there."""

FAR = 1.5
"""A gap that no class of a clean network had in tuning cases."""

REFINED = 24
"""Steps in which a dense change is fitted to its length."""


@dataclass(frozen=True, eq=False)
class Surrogate:
    """One guess: x' = x + weight (paint - x) for a patch, x' = clip(x + paint) for a dense change.

    Attributes:
        target: The class that it leads to, or `ALL_TO_ALL`.
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
        targets: The classes; `[ALL_TO_ALL]` for a trigger with a target for each label; none where none stands out.
        triggers: The guesses, several for each of them.
        clear: Whether the targets are clearly easier to reach than all other classes, by small patches too.
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
            others = order[scene.labels != trigger.target]
            led, chance = (
                scene.led(answers, trigger.target, others).float().mean()
                for answers in (scene.answers(trigger, others).argmax(1), plain[others])
            )
            found.append(float(((led - chance) / (1 - chance)).clamp(min=0)))
        return found

    def residual(
        self,
        model: nn.Module,
        images: Dataset[Any] | DataLoader[Any],
        *,
        batch_size: int = 256,
        amp: bool = True,
        forward: Forward = default_forward,
    ) -> float:
        """How often the triggers lead images to their class in a model, in [0, 1]: near 1 in one with the backdoor.

        The largest of `rates` among kinds of triggers, of each kind the least; 0 without triggers.

        Args:
            model: For instance the purified one.
            images: (image [C, H, W], label), best such as the triggers were not fitted to; the first 1,000 are used.
            batch_size: For a data set; a DataLoader brings its own.
            amp: Compute in bfloat16 where the device has instructions for it.
            forward: (model, (images, labels, ...)) -> (logits [B, K], targets [B]).

        Raises:
            ValueError: The batches are not (images, labels, ...).
        """
        begun = opened(model, images, seed=0, batch_size=batch_size, amp=amp, forward=forward, name="images")
        with begun as (batches, run), scene_of(model, batches, run) as scene:
            return self.residual_in(scene)

    def residual_in(self, scene: Scene) -> float:
        """The largest of `rates` among kinds of triggers, of each kind the least; 0 without triggers.

        A single one may lead to its class by what belongs to that class in clean networks too, and goes on doing so.
        """
        kinds: dict[tuple[int, str], list[float]] = {}
        for trigger, rate in zip(self.triggers, self.rates(scene), strict=True):
            if rate == rate:  # not NaN
                kinds.setdefault((trigger.target, trigger.kind), []).append(rate)
        return max(map(min, kinds.values()), default=0.0)


def surrogates(
    model: nn.Module,
    clean: Dataset[Any] | DataLoader[Any],
    *,
    target: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
    amp: bool = True,
    forward: Forward = default_forward,
) -> Surrogates:
    """Guess what the trigger of a network may be, from clean images alone: what `purify` judges itself by.

        found = bdfast.surrogates(model, clean)
        print(found.targets, found.residual(model, held_out), found.residual(purified, held_out))

    A class that is easy to reach is no proof of a backdoor, and some backdoors leave none (docs/choosing-strength.md).

    Args:
        model: The suspect network; its device is used, and it is left as it was.
        clean: Map-style data set of (image [C, H, W], label), or a DataLoader over one; the first 1,000 are used.
        target: The target label, where it is known.
        seed: Fixes all randomness.
        batch_size: For a data set; a DataLoader brings its own.
        amp: Compute in bfloat16 where the device has instructions for it.
        forward: (model, (images, labels, ...)) -> (logits [B, K], targets [B]).

    Raises:
        ValueError: The batches are not (images, labels, ...), or there is no such class.
    """
    draws = torch.Generator().manual_seed(derived_seed(seed, "surrogates"))
    begun = opened(model, clean, seed=seed, batch_size=batch_size, amp=amp, forward=forward)
    with begun as (batches, run), scene_of(model, batches, run) as scene:
        if target is not None and not 0 <= target < scene.classes:
            raise ValueError(
                f"target: expected a class in 0..{scene.classes - 1}, got {target}; leave it out to search."
            )
        return find_surrogates(scene, draws, targets=None if target is None else [target])


def find_surrogates(scene: Scene, draws: torch.Generator, *, targets: list[int] | None = None) -> Surrogates:
    """Guess triggers of several kinds towards every suspect class, or towards `targets`.

    What tells a backdoor that is left from one that is gone is the largest rate of several kinds: a dense change may
    have lost its effect where a patch still has it.
    """
    lengths = least_lengths(scene, draws, among=targets)
    suspects = lengths.suspects if targets is None else targets
    triggers = tuple(trigger for target in suspects for trigger in _towards(scene, target, lengths, draws))
    found = Surrogates(lengths, suspects, triggers, targets is not None or lengths.gap >= FAR)
    return found if found.clear or not suspects else _by_patches(found, scene)


def _by_patches(found: Surrogates, scene: Scene) -> Surrogates:
    """What patches tell: of several suspects those that one leads to far better, and whether it is a clear case."""
    least: dict[int, float] = {}
    for trigger, rate in zip(found.triggers, found.rates(scene), strict=True):
        if trigger.weight is not None:
            least[trigger.target] = min(rate, least.get(trigger.target, 1.0))
    best = max(least.values(), default=0.0)
    kept = [target for target in found.targets if least[target] >= BESIDE * best]
    if best < PATCHED or kept == found.targets:
        return replace(found, clear=found.lengths.gap >= GAP and best >= LED)
    triggers = tuple(trigger for trigger in found.triggers if trigger.target in kept)
    return replace(found, targets=kept, triggers=triggers, clear=True)


def _towards(scene: Scene, target: int, lengths: LeastLengths, draws: torch.Generator) -> Iterator[Surrogate]:
    device = scene.images.device
    least = min(1.0, float(lengths.usable([target])))
    reach = torch.tensor([min(1.0, least * factor) for factor in FACTORS for _ in range(SEEDS)], device=device)
    start = torch.randn(len(reach), *scene.images.shape[1:], generator=draws).to(device)
    changes = lead(scene, torch.full((len(reach),), target, device=device), start, reach, draws, steps=REFINED)
    names = [f"dense {factor:g}" for factor in FACTORS for _ in range(SEEDS)]
    for change, name in zip(changes, names, strict=True):
        yield Surrogate(target, change, None, scene.limits, name)
    for weight in AREA_WEIGHTS:
        cover, paint = fit_patch(scene, target, weight, draws)
        yield Surrogate(target, paint, cover, scene.limits, "patch")
