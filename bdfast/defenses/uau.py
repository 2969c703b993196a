"""UAU: fine-tuning on images with changes that lead to the suspected target label, found anew in every round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from bdfast.data.batches import Batch, Batches, with_images
from bdfast.defenses.distillation import Distilling
from bdfast.defenses.stages import Begun, InRounds
from bdfast.inversion.least_length import LeastLengths, least_lengths
from bdfast.inversion.scene import Scene, scene_of
from bdfast.inversion.surrogates import Surrogates
from bdfast.inversion.universal import lead
from bdfast.training import Run
from bdfast.training.batchnorm import Policy
from bdfast.training.seeds import derived_seed

FACTORS, FACTORS_TO_ALL = (1.0, 1.5, 2.5), (1.0,)
"""Lengths of the changes, as multiples of the least length of their class. A small patch is a longer change than the
shortest dense one: without the long ones, some of its effect was left on a tuning network. Where the changes lead to
all classes, the long ones cost accuracy."""

WINDOWS_TO_ALL = 1
"""Changes in a window to each class, where these are all classes."""

WINDOW_SIDES, WINDOW_CHANGE = (0.1, 0.25), 0.6
"""Sides of the windows, as shares of the image, and the root mean square of a change there, as a share of the range."""

AT_ONCE = 10
"""Most target labels in a round."""


@dataclass(frozen=True)
class UAUDefense(Distilling, InRounds):
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
        rounds: Searches for changes in a stage; the learning rate falls from round to round, as `schedule` says.
        epochs: Epochs in a round, if not as many as make `updates` in a stage.
        changed_share: Share of the images in a batch that get a change of the whole image.
        windowed_share: Share of them that get one of a small window, whether they have the other or not.
        windows: Changes in a small window towards each suspected label, beside those of the whole image. Without them
            the patch on a vision transformer stayed.
        target: The target label, where it is known.
    """

    paper: ClassVar[str] = "ours, after Zeng et al., i-BAU, ICLR 2022, arXiv 2110.03735"

    updates: int = 200
    changed_share: float = 0.5
    windowed_share: float = 0.25
    target: int | None = None
    windows: int = 3
    bn: Policy = "recalibrate"

    rates: ClassVar[Sequence[float]] = (0.003, 0.01)
    unsuspected: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        self.check_at_least("windows", 0)
        self.check_share("changed_share")
        self.check_share("windowed_share")
        super().__post_init__()

    def begin(
        self, model: nn.Module, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> Begun:
        """See `Staged.begin`."""
        lengths, targets = self._suspects(given, data, run, surrogates)

        def train(options: UAUDefense, images: Batches, stage: str) -> None:
            for index in range(self.rounds):
                name = f"{stage}, round {index + 1}"
                change = self._changing(model, images, run, lengths, targets, name)
                in_round = replace(options, lr=options.rate * self._decay(index / self.rounds), schedule="constant")
                in_round.fine_tune(model, given, images, run, name, change=change)

        return Begun(train)

    def _suspects(
        self, given: nn.Module, data: Batches, run: Run, surrogates: Surrogates | None
    ) -> tuple[LeastLengths, list[int]]:
        """What it takes to lead images to each class, and the suspects."""
        if surrogates is not None:
            return surrogates.lengths, surrogates.targets
        draws = torch.Generator().manual_seed(derived_seed(run.seed, "surrogates"))
        with scene_of(given, data, run) as scene:
            found = least_lengths(scene, draws, among=None if self.target is None else [self.target])
        return found, found.suspects if self.target is None else [self.target]

    def _changing(
        self, model: nn.Module, tuning: Batches, run: Run, least: LeastLengths, suspects: list[int], name: str
    ) -> Callable[[Batch], Batch]:
        """Puts changes that lead `model`, as it is now, to target labels on some images of a batch; labels stay."""
        draws = torch.Generator().manual_seed(derived_seed(run.seed, name))
        with scene_of(model, tuning, run) as scene:
            led_to = suspects or torch.randperm(scene.classes, generator=draws)[:AT_ONCE].tolist()
            everywhere = _everywhere(scene, led_to, least, FACTORS if suspects else FACTORS_TO_ALL, draws)
            windows = self.windows if suspects else min(self.windows, WINDOWS_TO_ALL)
            in_windows = _in_windows(scene, led_to, windows, draws)
            limits = scene.limits

        def change(batch: Batch) -> Batch:
            images = batch[0]
            for changes, share in ((everywhere, self.changed_share), (in_windows, self.windowed_share)):
                if len(changes):
                    chosen = torch.randint(len(changes), (len(images),)).to(images.device)
                    some = (torch.rand(len(images)) < share).to(images.device).view(-1, 1, 1, 1)
                    images = torch.where(some, (images + changes[chosen]).clamp(*limits), images)
            return with_images(batch, images.to(batch[0]))

        return change


def _everywhere(
    scene: Scene, led_to: list[int], least: LeastLengths, factors: Sequence[float], draws: torch.Generator
) -> Tensor:
    """Changes [T, C, H, W] of the whole image, of each of the lengths to each of the classes."""
    targets = torch.tensor(led_to).repeat_interleave(len(factors))
    lengths = (least.usable(targets.tolist()) * torch.tensor(factors).repeat(len(led_to))).clamp(max=1.0)
    start = torch.randn(len(targets), *scene.images.shape[1:], generator=draws).to(scene.images.device)
    return lead(scene, targets.to(start.device), start, lengths.to(start.device), draws)


def _in_windows(scene: Scene, led_to: list[int], each: int, draws: torch.Generator) -> Tensor:
    """Changes [T, C, H, W] that are zero outside a square at a random place."""
    if each == 0:
        return scene.images[:0]
    targets = torch.tensor(led_to).repeat_interleave(each)
    height, width = scene.images.shape[-2:]
    windows = torch.zeros(len(targets), 1, height, width)
    for window in windows:
        share = torch.empty(()).uniform_(*WINDOW_SIDES, generator=draws)
        side = max(1, round(float(share) * min(height, width)))
        top, left = (int(torch.randint(extent - side + 1, (), generator=draws)) for extent in (height, width))
        window[:, top : top + side, left : left + side] = 1
    start = torch.randn(len(targets), *scene.images.shape[1:], generator=draws)
    lengths = WINDOW_CHANGE * windows.mean((1, 2, 3)).sqrt()
    start, windows, targets, lengths = (x.to(scene.images.device) for x in (start * windows, windows, targets, lengths))
    return lead(scene, targets, start, lengths, draws, windows=windows)
