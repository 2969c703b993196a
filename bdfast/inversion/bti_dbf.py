"""BTI-DBF: a trigger is what moves the features that benign images have no use for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bdfast.data.batches import Batch, Batches
from bdfast.inversion.benign_mask import BenignMask, learn_mask
from bdfast.inversion.features import Features
from bdfast.inversion.generator import Generator
from bdfast.inversion.opening import opened
from bdfast.inversion.pretraining import pretrain
from bdfast.inversion.scene import gathered
from bdfast.inversion.target_histogram import most_frequent_class
from bdfast.inversion.target_scan import easiest_class
from bdfast.ops.finite import check_finite_gradients
from bdfast.task import Forward, StepResult, at_least_float32, default_forward, measured
from bdfast.training import Run
from bdfast.training.copies import copy_of
from bdfast.training.modes import eval_mode, preserved_modes
from bdfast.training.progress import Progress
from bdfast.training.seeds import derived_seed

Logits = Callable[..., Tensor]
"""(images [B, C, H, W], labels, ...) -> [B, K]."""

SPREAD = 0.2
"""Standard deviation that the published code divides the images of CIFAR-10 by, as a share of their range. It measures
changes, and adds noise, after that."""

PATTERN_LR = 0.1
"""Learning rate of the pattern that all images share: pixel logits must change more than network weights."""

SCANNED = 2000
"""Most images that the search for the target label draws from."""


@dataclass(frozen=True)
class Inversion:
    """A guessed trigger.

    Attributes:
        generator: Images [B, C, H, W] -> images with the trigger.
        mask: [1, *feature map], 1 where benign images need the feature.
        layer: Name of the module whose output the mask is for.
        target: The label that the trigger leads to.
        evidence: [K], what led to that conclusion: the loss that is left when one change leads all images to a class
            ("scan", the least is the target's, infinite where all images are of the class), or the share of images that
            the generator turns into it ("histogram").
    """

    generator: Generator
    mask: Tensor
    layer: str
    target: int
    evidence: list[float]


@dataclass(frozen=True)
class BTIDBF:
    """BTI-DBF: Xu et al., "Towards reliable and efficient backdoor trigger inversion via decoupling benign features"
    (ICLR 2024).

    A mask m separates the features f that benign images need; a generator G then moves the others: it descends
    -||(1 - m)(f(G(x)) - f(x))||^2 + 0.01 ||m (f(G(x)) - f(x))||^2 as long as G(x) stays within `image_bound` of x and
    the benign features within `feature_bound`, and ||G(x) - x||^2 beyond; all as mean squares.

    Attributes:
        target: The label of the trigger where it is known.
        detect: How it is found out. "scan": the class that one change leads all images to with the least loss
            (`bdfast.inversion.target_scan`); the generator is then trained towards that class from the start.
            "histogram": as published, the class that a generator trained without a target label turns most images
            into. On the networks of the demo such a generator went elsewhere (docs/sharpness.md).
        mask_epochs: Epochs for the mask; published: 20.
        epochs: Epochs for the generator; published: 30.
        lr: Learning rate of the generator (Adam); published: 1e-3. The mask's is 0.01.
        width: Channels of the generator's first level; published: 32.
        image_bound: Mean square that a pixel may change by, as a share of the squared range; published: 0.3 on images
            divided by their standard deviation, which is 0.012 on CIFAR-10.
        feature_bound: The same for benign features, as a share of their mean square; published: 3, absolute.
        pretrain_epochs: Epochs in which the generator first learns to change nothing, where ours starts; published: 50.
        compat: "official" does as the published code: features are measured absolutely, the mask is learnt on a copy in
            training mode, whose BatchNorm statistics then serve the generator, the target label is counted with the
            original on augmented images, and no pattern is shared by all images. The generator remains a U-Net of our
            own with paint instead of theirs, and its target label where `target` says one.
    """

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "detect": "histogram",
        "mask_epochs": 20,
        "epochs": 30,
        "lr": 1e-3,
        "width": 32,
        "image_bound": 0.3 * SPREAD**2,
        "feature_bound": 3.0,
        "pretrain_epochs": 50,
        "compat": "official",
    }
    """The options of the published code on CIFAR-10: `bdfast.BTIDBF(**bdfast.BTIDBF.PUBLISHED)`; in batches of 128."""

    target: int | None = None
    detect: Literal["scan", "histogram"] = "scan"
    mask_epochs: int = 3
    epochs: int = 6
    lr: float = 3e-3
    width: int = 8
    image_bound: float = 0.01
    feature_bound: float = 3.0
    pretrain_epochs: int = 0
    compat: Literal["official"] | None = None

    def run(
        self, model: nn.Module, clean: Batches, run: Run, stage: str = "invert", start: Inversion | None = None
    ) -> Inversion:
        """Invert the trigger of `model`, which is only read.

        Args:
            model: The suspect network.
            clean: Batches of (images [B, C, H, W], labels).
            run: Seed, precision, progress, history and checkpoints.
            stage: Name in progress and checkpoints.
            start: An earlier inversion, from which the generator goes on and whose target label holds.
        """
        images, labels, limits = gathered(clean, SCANNED)
        batch = next(clean.ordered())
        draws = torch.Generator().manual_seed(derived_seed(run.seed, stage))
        network = copy_of(model) if self.compat else model

        def answers_of(network: nn.Module) -> Logits:
            def logits(x: Tensor, *rest: Any) -> Tensor:
                with run.autocast(clean.device):
                    passed = run.forward(network, (x, *(rest or [labels[:1].expand(len(x))])))
                return at_least_float32(passed[0])

            return logits

        # In eval mode from the first pass on: it must not move the BatchNorm statistics.
        with preserved_modes(network), Features(network.eval(), lambda: run.forward(network, batch)) as features:
            network.requires_grad_(False)
            logits = answers_of(network)
            classes = logits(images[:1]).shape[1]
            torch.manual_seed(derived_seed(run.seed, stage, "weights"))
            place = (clean.device, torch.promote_types(images.dtype, torch.float32))
            mask = BenignMask(features.values.shape[1:]).to(*place)
            generator = Generator(images.shape[1:], width=self.width, limits=limits).to(*place)
            generator.pattern.requires_grad_(not self.compat)
            unit = (limits[1] - limits[0]) * (SPREAD if self.compat else 1)
            target, evidence = self.target, []
            if start is not None:
                generator.load_state_dict(start.generator.state_dict())
                target, evidence = start.target, start.evidence
            elif target is None and self.detect == "scan":

                def scan() -> dict[str, Any]:
                    chunk = clean.batch_size
                    return easiest_class(logits, images, labels, classes, limits=limits, chunk=chunk, generator=draws)

                found = run.once(f"{stage} scan", scan)
                target, evidence = found["target"], found["evidence"]
            given = (features, logits, clean, run)
            if self.pretrain_epochs and start is None:
                epochs = self.pretrain_epochs
                pretrain(generator, *given, f"{stage} pretraining", epochs=epochs, lr=self.lr, unit=unit)
            training = self.compat is not None
            learn_mask(mask, network, *given, f"{stage} mask", epochs=self.mask_epochs, training=training)
            self._learn_generator(generator, mask().detach(), *given, target, stage)
            if target is None:
                shown = clean.ordered()
                if self.compat:
                    torch.manual_seed(derived_seed(run.seed, stage, "histogram"))
                    shown = map(run.augmented, shown)
                with eval_mode(model):
                    target, evidence = most_frequent_class(
                        generator.eval(), answers_of(model), shown, classes, unit=unit, draws=draws
                    )
            return Inversion(generator.eval(), mask().detach(), features.layer, target, evidence)

    def _learn_generator(
        self,
        generator: Generator,
        mask: Tensor,
        features: Features,
        logits: Logits,
        clean: Batches,
        run: Run,
        target: int | None,
        stage: str,
    ) -> None:
        network = [parameter for name, parameter in generator.named_parameters() if name != "pattern"]
        groups: list[dict[str, Any]] = [{"params": network}]
        if generator.pattern.requires_grad:
            groups.append({"params": [generator.pattern], "lr": PATTERN_LR})
        optimizer = torch.optim.Adam(groups, lr=self.lr)
        span = generator.high - generator.low
        far = SPREAD**2 if self.compat else self.image_bound  # the distance that costs 1

        def step(batch: Batch) -> StepResult:
            images, targets = batch[:2]
            with torch.no_grad():
                logits(images, *batch[1:])
                before = at_least_float32(features.values)
            optimizer.zero_grad()
            with run.autocast(clean.device):
                changed = generator(images)
            answers = logits(changed, *batch[1:])
            moved = (at_least_float32(features.values) - before).square()
            if not self.compat:
                moved = moved / before.square().mean()
            benign, other = (mask.square() * moved).mean(), ((1 - mask).square() * moved).mean()
            distance = (changed - images).square().mean() / span**2
            # As in the published code, what has gone too far first comes back.
            within = (distance <= self.image_bound) & (benign <= self.feature_bound)
            loss = torch.where(within, 0.01 * benign - other, distance / far)
            if target is not None:
                led = torch.full_like(targets, target)
                loss = loss + F.cross_entropy(answers, led)
            loss.backward()
            check_finite_gradients(generator.named_parameters())
            optimizer.step()
            return measured(loss, answers, targets if target is None else led)

        run.epochs(stage, generator, clean, step, optimizer, epochs=self.epochs)


def invert_trigger(
    model: nn.Module,
    clean: Dataset[Any] | DataLoader[Any],
    *,
    options: BTIDBF | None = None,
    seed: int = 0,
    batch_size: int = 256,
    amp: bool = True,
    forward: Forward = default_forward,
    progress: Progress | None = None,
) -> Inversion:
    """Guess the trigger of a backdoored classifier from clean images alone.

    A network without a backdoor gives an answer too: the class that is reached most easily.

    Args:
        model: The suspect network; its device is used, and it is left as it was.
        clean: Map-style data set of (image [C, H, W], label), or a DataLoader over one.
        options: How to invert.
        seed: Fixes all randomness.
        batch_size: For a data set; a DataLoader brings its own.
        amp: Compute in bfloat16 where the device has instructions for it.
        forward: (model, (images, labels, ...)) -> (logits [B, K], targets [B]).
        progress: Where to show progress.

    Raises:
        ValueError: The batches are not (images, labels, ...), or the network has no features to read.
    """
    begun = opened(model, clean, seed=seed, batch_size=batch_size, amp=amp, forward=forward, progress=progress)
    with begun as (batches, run):
        return (options or BTIDBF()).run(model, batches, run)
