"""How hard to purify, chosen from clean images alone: the one rule for all methods.

Too weak a setting leaves the backdoor, too strong a one costs accuracy, and clean accuracy alone does not tell where
between the two the backdoor goes. What tells it are surrogate triggers: guesses at the trigger, from the given model
and clean images. A method declares a ladder of strengths, most often learning rates, and takes one step of it after the
other, each going on from where the last one ended, until the surrogates have lost their effect on held-out images, or
the accuracy there is below a budget. The weakest step that does it is taken (docs/choosing-strength.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from bdfast import task
from bdfast.data.batches import Batches
from bdfast.inversion.scene import holds_images, scene_of
from bdfast.inversion.surrogates import Surrogates, find_surrogates
from bdfast.training import Probe, Run
from bdfast.training.modes import eval_mode
from bdfast.training.seeds import derived_seed

TUNED_ON = 0.75
"""Share of the clean images that are trained on; the judge looks at the others."""

ENOUGH = 0.03
"""The residual at which no further step follows: below that of the verdict, as the ASR may be larger."""

WORTH = 0.02
"""What a stronger step has to gain, as a fraction, residual and accuracy together; less is noise."""

BELOW = 3.0
"""How much more accuracy below the floor weighs: a network that is ruined has no residual either."""

SURE, AT_LEAST = 2.0, 3.0
"""How many standard errors a loss of accuracy is uncertain by, and of how many images at least: where none of n images
shows a loss, one of up to 3 / n is possible still (95 %)."""

RETRIES, LOWER = 3, 0.25
"""How often the ladder is tried again at lower rates, and the factor between these rates."""


@dataclass(frozen=True)
class Reached:
    """What a model shows on the held-out images.

    Attributes:
        residual: How often surrogate triggers lead to their class, in [0, 1].
        right: [N] bool, which images it gets right.
    """

    residual: float
    right: torch.Tensor

    @property
    def accuracy(self) -> float:
        """Share of the images that it gets right."""
        return float(self.right.float().mean())


class Judge:
    """Held-out images, and surrogate triggers of the given model.

    Args:
        given: The original model; only read.
        clean: The clean set.
        run: Seed, precision and `forward`.
        target: The target label, where it is known.

    Attributes:
        tuning: The images to train on.
        held_out: Those that the judge looks at.
        surrogates: None where the batches are not (images, labels).
        run: Seed, precision and `forward`.
        before: What the given model shows.
    """

    def __init__(self, given: nn.Module, clean: Batches, run: Run, *, target: int | None = None) -> None:
        self.tuning, self.held_out = clean.split(TUNED_ON, derived_seed(run.seed, "held out"))
        self.run = run
        self.surrogates: Surrogates | None = None
        if holds_images(clean):
            draws = torch.Generator().manual_seed(derived_seed(run.seed, "surrogates"))
            # All images: of a hundred, every one counts, and a trigger that was fitted to held-out images is no weaker.
            with scene_of(given, clean, run) as scene:
                self.surrogates = find_surrogates(scene, draws, targets=None if target is None else [target])
        self.before = self(given)

    @property
    def targets(self) -> list[int]:
        """The suspected target labels; empty where no class stands out."""
        return [] if self.surrogates is None else self.surrogates.targets

    @property
    def clear(self) -> bool:
        """Whether a class stands out clearly; some class is the easiest in clean networks, too."""
        return self.surrogates is not None and self.surrogates.clear

    def __call__(self, model: nn.Module) -> Reached:
        """Measure a model."""
        residual = 0.0
        if self.surrogates is not None and self.surrogates.targets:
            with scene_of(model, self.held_out, self.run) as scene:
                residual = self.surrogates.residual_in(scene)
        return Reached(residual, self._right(model))

    def floor(self, reached: Reached, max_accuracy_drop: float) -> float:
        """The least accuracy that is accepted: the budget, and one standard error of the difference.

        Both models see the same images, so that only those count that one of them gets right and the other does not.
        """
        return self.before.accuracy - max_accuracy_drop - _error(self.before, reached)

    def warnings(self, reached: Reached, max_accuracy_drop: float) -> list[str]:
        """What speaks against a model that is kept: the accuracy that it lost, or that so few images cannot tell."""
        least, images = self.before.accuracy - max_accuracy_drop, len(self.before.right)
        if reached.accuracy < least:
            return [
                f"max_accuracy_drop: expected a held-out accuracy of {least:.1%} or more after purification, got "
                f"{reached.accuracy:.1%}: no weaker step was as good; pass more clean images, or try another method."
            ]
        doubt = max(SURE * _error(self.before, reached), AT_LEAST / images)
        if doubt > max_accuracy_drop:
            return [
                f"clean: expected enough images to tell a loss of {100 * max_accuracy_drop:.3g} points of accuracy, "
                f"got {images} held-out ones, on which {100 * doubt:.2g} points more than they show may be lost; pass "
                "more, or measure the purified model on images of your own."
            ]
        return []

    def _right(self, model: nn.Module) -> torch.Tensor:
        right = []
        with eval_mode(model), torch.inference_mode(), self.run.autocast(self.held_out.device):
            for batch in self.held_out.ordered():
                logits, targets = self.run.forward(model, batch)[:2]
                counted = targets != task.IGNORED
                right.append((logits.argmax(-1) == targets)[counted].flatten())
        return torch.cat(right).cpu()


@dataclass(frozen=True)
class Choice:
    """The step of the ladder that was taken, and what it reached; None for the given model as it was."""

    strength: float | None
    reached: Reached


def climb(
    ladder: Sequence[float],
    go_on: Callable[[float], None],
    model: nn.Module,
    judge: Judge,
    run: Run,
    *,
    max_accuracy_drop: float,
    option: str = "lr",
) -> Choice:
    """Purify `model` in place, one strength after the other, and leave it with the weights of the step that is taken.

    With suspected target labels: the first step whose residual is at most `ENOUGH`. Where the accuracy falls below the
    floor before that, the step with the least sum of residual and accuracy lost, with what is below the floor counted
    `BELOW` times more, and a weaker one unless a stronger one is better by `WORTH`. Without: the last step whose
    accuracy is above the floor. `Choice(None, ...)` if there is none, or if that sum of the given model is no worse:
    a network that is ruined is no better than one with a backdoor.

    Where no step leaves the accuracy above the floor, or the first one diverges, the whole ladder is tried again at
    lower learning rates.

    Args:
        ladder: Learning rates or other strengths, weak to strong.
        go_on: Trains or prunes the model further, in place, at that strength.
        model: The model, as the method has prepared it.
        judge: Measures it.
        run: Gets a `Probe` for each step, and what speaks against the one that is taken.
        max_accuracy_drop: The budget of held-out accuracy, as a fraction.
        option: The option that is the strength.

    Raises:
        FloatingPointError: Training diverged on the first step, and at `RETRIES` lower rates too.
    """
    best, weights, least = Choice(None, judge.before), None, _cost(judge.before, judge.before.accuracy, judge)
    prepared = copy.deepcopy(model.state_dict())
    probes: list[Probe] = []
    taken: int | None = None
    diverged: list[float] = []
    for lowered in range(RETRIES + 1 if option == "lr" else 1):
        model.load_state_dict(prepared)
        borne = False
        for index, strength in enumerate(strength * LOWER**lowered for strength in ladder):
            try:
                go_on(strength)
            except FloatingPointError as error:
                if index > 0:
                    break
                diverged.append(strength)
                if lowered == RETRIES and len(diverged) > RETRIES:
                    model.load_state_dict(prepared)
                    tried = ", ".join(f"{rate:g}" for rate in diverged)
                    raise FloatingPointError(
                        f"lr: expected a learning rate at which training stays finite, got none among {tried}; pass a "
                        f"lower one, or amp=False. The last: {error}"
                    ) from error
                break
            reached = judge(model)
            floor = judge.floor(reached, max_accuracy_drop)
            probes.append(Probe(option, strength, reached.accuracy, floor, chosen=False, residual=reached.residual))
            within = reached.accuracy >= floor
            borne |= within
            cost = _cost(reached, floor, judge)
            if cost < least - WORTH if judge.targets else within:
                best, least, weights = Choice(strength, reached), cost, copy.deepcopy(model.state_dict())
                taken = len(probes) - 1
            if (judge.targets and within and reached.residual <= ENOUGH) or (not within and index > 0):
                break
        if borne:
            break
    run.history.extend(replace(probe, chosen=place == taken) for place, probe in enumerate(probes))
    if weights is not None:
        model.load_state_dict(weights)
        run.warnings += judge.warnings(best.reached, max_accuracy_drop)
    return best


def _error(before: Reached, after: Reached) -> float:
    """One standard error of the difference in accuracy."""
    return int((after.right != before.right).sum()) ** 0.5 / len(before.right)


def _cost(reached: Reached, floor: float, judge: Judge) -> float:
    lost = max(0.0, judge.before.accuracy - reached.accuracy)
    return max(0.0, reached.residual - ENOUGH) + lost + BELOW * max(0.0, floor - reached.accuracy)
