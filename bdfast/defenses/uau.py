"""UAU: fine-tuning on images with changes that lead to the suspected target label, found anew in every round."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdfast.data.batches import Batch, Batches, with_images
from bdfast.defenses.base import Outcome
from bdfast.defenses.distillation import Distilling
from bdfast.defenses.verdict import Verdict
from bdfast.inversion.scene import scene_of
from bdfast.inversion.surrogates import Surrogates, find_surrogates
from bdfast.inversion.universal import lead
from bdfast.training import Probe, Run
from bdfast.training.batchnorm import Policy
from bdfast.training.budget import budget
from bdfast.training.copies import copy_of
from bdfast.training.seeds import derived_seed

TUNED_ON = 0.75
"""Share of the clean images that are trained on; the verdict looks at the others."""

ENOUGH = 0.03
"""The residual at which no further stage follows: below that of the verdict, as the ASR may be larger."""

WORTH = 0.5
"""The share of the residual that a further stage may leave; one that leaves more costs accuracy for nothing."""

STRONGER = 2.0
"""Factor between the learning rates of two stages."""

FACTORS, FACTORS_TO_ALL = (1.0, 1.5, 2.5), (1.0, 1.5)
"""Lengths of the changes, as multiples of the least length of their class. A small patch is a longer change than the
shortest dense one: without the long ones, some of its effect was left on a tuning network. Where the changes lead to
all classes, the long ones cost accuracy."""

AT_ONCE = 10
"""Most target labels in a round."""

UNREACHED = 1.2
"""The length for classes that the search did not reach, as a multiple of the longest that it found."""


@dataclass(frozen=True)
class UAUDefense(Distilling):
    """Universal adversarial unlearning, ours: the minimax of Zeng et al., "Adversarial unlearning of backdoors via
    implicit hypergradient" (i-BAU, ICLR 2022), with changes that lead to a target label as in Wang et al., "Neural
    Cleanse" (S&P 2019), no longer than such a label needs, and with the given model's answers to the unchanged images
    as labels.

    It looks for the class that is easiest to reach with one change for all images, the suspected target label. In each
    round it finds such changes for the network as it is then, and fine-tunes on images a part of which have them. A
    stage of some rounds is repeated with a larger rate until surrogate triggers, which it never trains on, have lost
    their effect on held-out images. Where no class stands out, the changes lead to all classes, and one stage is all;
    if that costs too much, the network stays as it was.

    Attributes:
        lr: Learning rate in the first round of the first stage, from which it falls from round to round as `schedule`
            says; each stage doubles it.
        stages: Most stages.
        rounds: Searches for changes in a stage.
        updates: Updates in a stage, about; batch size and epochs follow from the number of images.
        epochs: Epochs in a round; 0 takes them from `updates`.
        changed_share: Share of the images in a batch that get a change.
        target: The target label, where it is known.
        max_accuracy_drop: A further stage, or the only one, that costs more held-out accuracy than this and one
            standard error is undone. So is a further one that leaves more than half of the residual.
    """

    paper: ClassVar[str] = "ours, after Zeng et al., i-BAU, ICLR 2022, arXiv 2110.03735"

    lr: float = 0.003
    stages: int = 3
    rounds: int = 5
    updates: int = 300
    epochs: int = 0
    changed_share: float = 0.5
    target: int | None = None
    max_accuracy_drop: float = 0.03
    bn: Policy = "recalibrate"

    def __post_init__(self) -> None:
        for name in ("stages", "rounds", "updates"):
            self.check_at_least(name, 1)
        self.check_share("changed_share")
        self.check_positive("max_accuracy_drop")
        super().__post_init__()

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Outcome:
        """Purify `model` in place; see `Defense.run`.

        Raises:
            FloatingPointError: A gradient of the first stage became NaN or infinite; a later stage is undone then.
        """
        given = copy_of(model)
        tuning, held_out = clean.split(TUNED_ON, derived_seed(run.seed, "held out"))
        # All images: of a hundred, every one counts, and a trigger that was fitted to held-out images is no weaker.
        with scene_of(given, clean, run) as scene:
            draws = torch.Generator().manual_seed(derived_seed(run.seed, "surrogates"))
            surrogates = find_surrogates(scene, draws, targets=None if self.target is None else [self.target])

        def judged() -> tuple[float, float]:
            with scene_of(model, held_out, run) as scene:
                residual = surrogates.residual(scene)
            return residual, run.accuracy(model, held_out)

        before = after = judged()
        chosen, probes = 0.0, []
        floor = before[1] - self.max_accuracy_drop - (before[1] * (1 - before[1]) / len(held_out)) ** 0.5
        for stage in range(self.stages if surrogates.targets else 1):
            kept = copy.deepcopy(model.state_dict())
            try:
                self._unlearn(stage, model, given, tuning, run, surrogates)
            except FloatingPointError:
                if stage == 0:
                    raise
                model.load_state_dict(kept)
                break
            reached = judged()
            # Before the first stage there is nothing but the backdoor: with a suspect it stays, whatever it costs.
            needed = stage == 0 and bool(surrogates.targets)
            undone = not needed and (reached[1] < floor or reached[0] > WORTH * after[0])
            rate = self.lr * STRONGER**stage
            probes.append(Probe("lr", rate, reached[1], floor, chosen=False, residual=reached[0]))
            if undone:
                model.load_state_dict(kept)
                break
            after, chosen = reached, rate
            if after[0] <= ENOUGH:
                break
        run.history.extend(replace(probe, chosen=probe.value == chosen) for probe in probes)
        verdict = Verdict(tuple(surrogates.targets), before[0], after[0], before[1], after[1], len(held_out))
        lengths = [length if length < math.inf else None for length in surrogates.lengths.lengths.tolist()]
        return Outcome(found={"targets": surrogates.targets, "least_lengths": lengths}, verdict=verdict)

    def _unlearn(
        self, stage: int, model: nn.Module, given: nn.Module, tuning: Batches, run: Run, surrogates: Surrogates
    ) -> None:
        length = budget(max(1, self.updates // self.rounds), len(tuning))
        data = tuning.in_batches_of(length.batch_size)
        for index in range(self.rounds):
            name = f"unlearn {stage + 1}.{index + 1}"
            change = self._changing(model, tuning, run, surrogates, name)
            options = replace(
                self,
                lr=self.lr * STRONGER**stage * self._decay(index / self.rounds),
                epochs=self.epochs or length.epochs,
                schedule="constant",
            )
            options.fine_tune(model, given, data, run, name, change=change)

    def _changing(
        self, model: nn.Module, tuning: Batches, run: Run, surrogates: Surrogates, name: str
    ) -> Callable[[Batch], Batch]:
        """Puts changes that lead `model`, as it is now, to target labels on some images of a batch; labels stay."""
        draws = torch.Generator().manual_seed(derived_seed(run.seed, name))
        with scene_of(model, tuning, run) as scene:
            led_to = surrogates.targets or torch.randperm(scene.classes, generator=draws)[:AT_ONCE].tolist()
            factors = FACTORS if surrogates.targets else FACTORS_TO_ALL
            targets = torch.tensor(led_to).repeat_interleave(len(factors)).to(scene.images.device)
            lengths = _usable(surrogates.lengths.lengths)[targets.cpu()] * torch.tensor(factors).repeat(len(led_to))
            start = torch.randn(len(targets), *scene.images.shape[1:], generator=draws).to(scene.images.device)
            changes = lead(scene, targets, start, lengths.clamp(max=1.0).to(scene.images.device), draws)
            limits = scene.limits

        def change(batch: Batch) -> Batch:
            images = batch[0]
            chosen = torch.randint(len(changes), (len(images),)).to(images.device)
            some = (torch.rand(len(images)) < self.changed_share).to(images.device).view(-1, 1, 1, 1)
            return with_images(batch, torch.where(some, (images + changes[chosen]).clamp(*limits), images).to(images))

        return change


def _usable(lengths: Tensor) -> Tensor:
    """The least lengths, with a guess for classes that the search did not reach."""
    reached = lengths[lengths.isfinite()]
    longest = float(reached.max()) if len(reached) else 1.0
    return lengths.clamp(max=UNREACHED * longest)
