"""What an audit works with: the networks, the defender's images, the trigger, and what it measures on."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bdfast.attacks import Triggered
from bdfast.audits.rates import Figures
from bdfast.audits.triggers import AttackTrigger, Change, Shown, SurrogateTrigger, Trigger
from bdfast.data.batches import Batches
from bdfast.data.cache import CachedPasses
from bdfast.evaluation import Evaluator
from bdfast.evaluation.evaluator import CACHE_BYTES
from bdfast.inversion.scene import holds_images, pixel_limits, scene_of
from bdfast.inversion.surrogates import Surrogate, find_surrogates
from bdfast.selection import TUNED_ON
from bdfast.training import Run
from bdfast.training.clean_set import UNIT
from bdfast.training.seeds import derived_seed

Images = Dataset[Any] | DataLoader[Any]


@dataclass(frozen=True, eq=False)
class Case:
    """The case of one audit. The networks are in eval mode and need no gradients; audits train copies.

    Attributes:
        before: The network as it was handed in.
        after: The purified one.
        clean_model: One that never had a backdoor, or None.
        clean: The defender's images, for everything that is trained or estimated.
        evaluator: Holds the clean test images, and those with the trigger.
        trigger: The trigger, or None where there is none.
        limits: Least and greatest value that a pixel may have: 0 and 1 with the trigger of an attack, else those of the
            defender's images; None for inputs that are no images.
        untriggered: The images of the triggered set without the trigger, with the same labels.
        notes: What was decided on the way, for the reader.
        kept: What audits share, such as a retuned network.
    """

    before: nn.Module
    after: nn.Module
    clean_model: nn.Module | None
    clean: Batches
    evaluator: Evaluator
    trigger: Trigger | None
    limits: tuple[float, float] | None
    untriggered: Batches | None
    notes: list[str]
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def rate_name(self) -> str:
        """What rates are called."""
        return "ASR" if self.trigger is None else self.trigger.rate_name

    def network(self, name: str) -> nn.Module:
        """The network of that name: "before", "after" or "clean_model"."""
        found = getattr(self, name)
        assert isinstance(found, nn.Module)
        return found

    def figures(self, model: nn.Module, *, recalibrated: bool = False, triggered: bool = True) -> Figures:
        """ACC and rate of a network, which is left as it was.

        Args:
            model: Any network for these images.
            recalibrated: With BatchNorm statistics estimated anew on the defender's images.
            triggered: Show the images with the trigger; else the rate is that of the same images without it.
        """
        evaluator = self.evaluator
        if not triggered:
            assert self.untriggered is not None
            evaluator = copy.copy(evaluator)
            evaluator.triggered = CachedPasses(self.untriggered, 0)
        found = evaluator(model, recalibrate_on=self.clean if recalibrated else None)
        return Figures(found.acc, found.asr)


def case_of(
    before: nn.Module,
    after: nn.Module,
    clean: Batches,
    run: Run,
    *,
    triggered: Triggered | None,
    test: Images | None,
    clean_model: nn.Module | None,
    target: int | None,
) -> Case:
    """Set the case up: which images are measured on, and what the trigger is.

    Args and errors as for `audit`.
    """
    notes = []
    images = holds_images(clean)
    if triggered is None and test is None:
        clean, measured = clean.split(TUNED_ON, derived_seed(run.seed, "held out"))
        notes.append(f"Measured on {len(measured):,} held-out images of `clean`, which no audit trains on.")
    else:
        data = test if test is not None else triggered.data  # type: ignore[union-attr]
        measured = Batches(data, device=clean.device, batch_size=clean.batch_size, name="test")
        source = "`test`" if test is not None else "the images behind `triggered`"
        notes.append(f"ACC is measured on {source} ({len(measured):,}).")
    limits = pixel_limits(clean) if images else None
    evaluator = Evaluator(clean.data, device=clean.device, forward=run.forward)
    evaluator.clean = CachedPasses(measured, CACHE_BYTES // 2)
    trigger: Trigger | None = None
    behind = measured
    if triggered is not None:
        _check_unit_range(limits)
        limits = (0.0, 1.0)  # the trigger may be brighter or darker than all of the defender's images
        trigger = AttackTrigger(triggered)
        shown = Batches(triggered, device=clean.device, batch_size=clean.batch_size, name="triggered")
        behind = Batches(triggered.data, device=clean.device, batch_size=clean.batch_size, name="triggered")
    elif images:
        trigger = _surrogate(before, after, clean, run, target, notes, controlled=clean_model is not None)
        shown = measured if trigger is None else Shown(measured, trigger.shown)
    else:
        notes.append("The inputs are no images [B, C, H, W], for which there are no surrogate triggers.")
    untriggered = None
    if trigger is not None:
        evaluator.triggered = CachedPasses(shown, CACHE_BYTES // 2)
        untriggered = Shown(behind, _without(trigger))
        if next(iter(untriggered.ordered()), None) is None:
            raise ValueError(
                f"{measured.name}: expected images of other classes than the target of the trigger to measure on, got "
                "none; pass more images of all classes."
            )
    return Case(before, after, clean_model, clean, evaluator, trigger, limits, untriggered, notes)


def _without(trigger: Trigger) -> Change:
    return lambda images, labels: (images, trigger.shown(images, labels)[1])


def _surrogate(
    before: nn.Module,
    after: nn.Module,
    clean: Batches,
    run: Run,
    target: int | None,
    notes: list[str],
    *,
    controlled: bool,
) -> SurrogateTrigger | None:
    """The guess that works best on `before`, and of whose effect purification took most away; None without any."""

    def search() -> dict[str, Any]:
        draws = torch.Generator().manual_seed(derived_seed(run.seed, "surrogates"))
        with scene_of(before, clean, run) as scene:
            if target is not None and not 0 <= target < scene.classes:
                raise ValueError(
                    f"target: expected a class in 0..{scene.classes - 1}, got {target}; leave it out to search."
                )
            found = find_surrogates(scene, draws, targets=None if target is None else [target])
            old = found.rates(scene)
        if not found.triggers:
            return {}
        with scene_of(after, clean, run) as scene:
            new = found.rates(scene)
        # What still works has nothing to come back from, and what never worked says nothing.
        values = [2 * b - a if a == a and b == b else float("-inf") for b, a in zip(old, new, strict=True)]
        return {**vars(found.triggers[values.index(max(values))]), "clear": found.clear}

    stored = run.once("surrogate", search)
    if not stored:
        notes.append("No class stands out, so there is no surrogate trigger; give `target` to have one, or triggers.")
        return None
    paint = stored["paint"].to(clean.device)
    weight = None if stored["weight"] is None else stored["weight"].to(clean.device)
    surrogate = Surrogate(stored["target"], paint, weight, tuple(stored["limits"]), stored["kind"])
    notes.append(
        f"No triggered data were given. A surrogate trigger ({surrogate.kind}, target label {surrogate.target}), "
        "guessed from `before`, stands in for the trigger: its surrogate rate is not the rate of the real one."
    )
    if not stored["clear"]:
        notes.append("Its class does not stand out clearly: in clean networks some class is the easiest, too.")
    if not controlled:
        notes.append(
            "A surrogate trigger may work in clean networks too, and these may learn it as fast; clean_model tells."
        )
    return SurrogateTrigger(surrogate, before, run.forward)


def _check_unit_range(limits: tuple[float, float] | None) -> None:
    if limits is None or limits[0] < -UNIT or limits[1] > 1 + UNIT:
        got = "inputs of another kind" if limits is None else f"values in [{limits[0]:.3g}, {limits[1]:.3g}]"
        raise ValueError(
            f"clean: expected images [C, H, W] in [0, 1], to which the trigger of `triggered` can be added, got {got}; "
            "make normalisation the first layer of the networks (bdfast.models.normalized), or leave triggered out."
        )
