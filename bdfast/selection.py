"""Choosing a method's strength from clean data alone.

Too weak a setting leaves the backdoor, too strong a one costs accuracy, and published code settles it by looking at
triggered test data, which a defender does not have. The rule here is the same for every method: the strongest setting
whose clean accuracy, on images that the probe was not tuned on and with BatchNorm statistics recalibrated, stays within
a budget of that of the weakest setting.

The budget counts from the weakest setting and not from the original model, since a short fine-tuning on a part of the
clean set costs accuracy whatever the strength, and the full one gives it back (docs/choosing-strength.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from bdfast.data.batches import Batches
from bdfast.training import Probe, Run
from bdfast.training.batchnorm import recalibrate
from bdfast.training.copies import copy_of
from bdfast.training.seeds import derived_seed

PROBE_EPOCHS = 6
"""Epochs of the fine-tuning in a probe."""

TUNED_ON = 0.75
"""Share of the clean images that a probe is tuned on; it is measured on the others."""

Attempt = Callable[[float, nn.Module, Batches, str], None]
"""(strength, model, images, stage): a short purification of the model, in place, of that strength."""


@dataclass(frozen=True)
class Choice:
    """A chosen strength, the held-out accuracy of every setting that was probed, and the least that was accepted."""

    strength: float
    probes: dict[float, float]
    floor: float


def strongest_within(ladder: Sequence[float], probe: Callable[[float], float], *, max_accuracy_drop: float) -> Choice:
    """The largest strength whose held-out accuracy is at least that of the weakest less `max_accuracy_drop`.

    Accuracy falls along the ladder, so a bisection finds it in about log2(len(ladder)) probes after the first.

    Args:
        ladder: Strengths, weak to strong.
        probe: Held-out accuracy of the model after a short purification of that strength.
        max_accuracy_drop: The budget, as a fraction.
    """
    probes = {ladder[0]: probe(ladder[0])}
    floor = probes[ladder[0]] - max_accuracy_drop
    low, high = 1, len(ladder)  # everything below `low` is within the budget, everything from `high` on is not
    while low < high:
        middle = (low + high) // 2
        accuracy = probes[ladder[middle]] = probe(ladder[middle])
        if accuracy >= floor:
            low = middle + 1
        else:
            high = middle
    return Choice(ladder[low - 1], probes, floor)


def choose_strength(
    option: str,
    ladder: Sequence[float],
    attempt: Attempt,
    model: nn.Module,
    clean: Batches,
    run: Run,
    *,
    max_accuracy_drop: float,
) -> float:
    """The strongest value of `option` within the budget, by probes on clean images; each leaves a row in the history.

    Args:
        option: Name of the option that is the method's strength.
        ladder: Its values, weak to strong.
        attempt: Purifies a copy of `model` on the images that it is given, with `PROBE_EPOCHS` of fine-tuning.
        model: The original model; only read.
        clean: The clean set.
        run: Seed, history and checkpoints.
        max_accuracy_drop: The budget, as a fraction.
    """
    tuning, held_out = clean.split(TUNED_ON, derived_seed(run.seed, "split"))

    def probe(value: float) -> float:
        candidate = copy_of(model)
        attempt(value, candidate, tuning, f"probe {option}={value:g}")
        recalibrate(candidate, tuning.ordered(), run.forward)
        return run.accuracy(candidate, held_out)

    choice = strongest_within(ladder, probe, max_accuracy_drop=max_accuracy_drop)
    for value, accuracy in sorted(choice.probes.items()):
        run.history.append(Probe(option, value, accuracy, choice.floor, chosen=value == choice.strength))
    return choice.strength
