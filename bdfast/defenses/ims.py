"""IMS: masks that keep clean answers, and whose inverse keeps what changes of the images achieve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bdfast import task
from bdfast.data.batches import Batch, Batches, with_images
from bdfast.defenses.parts.inverse_masks import InvertibleMasks, agreeing, disagreeing
from bdfast.defenses.parts.masks import channels_of, mask_scores, masked_at_most, thresholds_of
from bdfast.defenses.pruning import Pruning
from bdfast.inversion.scene import pixel_limits
from bdfast.neurons import NeuronIndex, NeuronScores
from bdfast.neurons.channels import scale_channels
from bdfast.ops.finite import check_finite_gradients
from bdfast.task import StepResult
from bdfast.training import Run
from bdfast.training.budget import budget
from bdfast.training.copies import copy_of


@dataclass(frozen=True)
class IMSDefense(Pruning):
    """Dunnett et al., "Backdoor mitigation via invertible pruning masks" (NeurIPS 2025, arXiv 2509.15497).

    A channel has a mask m and a selection s. Its factor is g + s (1 - g) with g = sigmoid(20 (m - 1/2)); its inverse
    factor has 1 - m for m. For each batch, AdamW changes the images so that the given network answers otherwise than
    before and the inversely masked one agrees with it. One step then moves m and s: the masked network has to answer as
    the given one does on clean images, changed or not; the inversely masked one has to agree with the given one on
    changed images, and to differ from its clean answers. The mean of 1 - s is penalised. The first of three phases has
    no changed images, and the second no penalty. No weight is trained, the channels are scaled by their factors.

    The masks lie on the outputs of convolutions; where these are the lesser part of the layers, on scales and biases of
    normalisation layers or, without any, on output units (ours). Ours, too: `threshold`, by which the strength is
    chosen; phases of fixed length, while a published one ends after 25 rounds without a loss that is lower by 2 %; and
    fewer, longer steps, since a change has to be large enough to lead the network astray.

    BatchNorm keeps its statistics, since estimating them anew undoes the factors in front of it, and brings the
    backdoor back: on one small network with BadNets on digits the ASR went from 20 % to 100 %.

    Attributes:
        threshold: Largest factor of a channel that is scaled; published: 1, so all are. Left out, it is chosen on
            held-out images.
        first_rounds: Steps of the first phase, about; published: 100, with batches of 256.
        rounds: Steps of the second and of the third phase each, about; published: 200.
        lr: Of AdamW for m and s; published: 0.02.
        steps: Steps of AdamW that change a batch; published: 20.
        step_size: Its learning rate, as a share of the range of the clean images; published: 0.001.
        sparsity: Weight of the penalty.
        bn: "frozen" only.
    """

    paper: ClassVar[str] = "Dunnett et al., NeurIPS 2025, arXiv 2509.15497"

    PUBLISHED: ClassVar[dict[str, Any]] = {
        "threshold": 1.0,
        "first_rounds": 100,
        "rounds": 200,
        "lr": 0.02,
        "steps": 20,
        "step_size": 0.001,
        "amp": False,
        "augment": None,
    }
    """The published run on CIFAR-10, as arguments of `purify`."""

    bn: Literal["recalibrate", "frozen"] = "frozen"
    threshold: float | None = None
    first_rounds: int = 30
    rounds: int = 40
    lr: float = 0.05
    steps: int = 5
    step_size: float = 0.05
    sparsity: float = 10.0

    scored_by: ClassVar[str] = "how far its factor is below 1"
    neurons_are: ClassVar[str] = "scaled"
    strength = "threshold"

    def __post_init__(self) -> None:
        if self.threshold is not None:
            self.check_share("threshold")
        for name in ("first_rounds", "rounds", "steps"):
            self.check_at_least(name, 1)
        for name in ("lr", "step_size"):
            self.check_positive(name)
        self.check_at_least("sparsity", 0)
        if self.bn != "frozen":
            raise ValueError(
                f"bn: expected 'frozen', got {self.bn!r}, which undoes factors in front of BatchNorm; leave it out, or "
                "take a method that switches channels off."
            )
        super().__post_init__()

    def check(self, model: nn.Module, clean: Batches, run: Run) -> None:
        """Refuse batches that are not (images, labels); see `Defense.check`."""
        super().check(model, clean, run)
        pixel_limits(clean)

    def rank(self, model: nn.Module, data: Batches, run: Run) -> NeuronScores:
        """See `Pruning.rank`: 1 less the factor."""
        masked = self.trained(model, data, run)
        return mask_scores(masked.factors(), masked.index)

    def chosen(self, scores: NeuronScores, strength: float) -> Tensor:
        """See `Pruning.chosen`."""
        return masked_at_most(scores, strength)

    def trained(self, model: nn.Module, data: Batches, run: Run) -> InvertibleMasks:
        """A copy of `model` with trained masks and selection."""
        convolutional = all(layer.kind == "conv" for layer in NeuronIndex.in_scope(model).layers)
        index = NeuronIndex(model, kinds="conv") if convolutional else channels_of(model, data, run)
        masked = InvertibleMasks(copy_of(model), index)
        low, high = pixel_limits(data)
        self._phase(masked, data, run, "masks", self.first_rounds, span=None, sparsity=self.sparsity)
        self._phase(masked, data, run, "masks, with changes", self.rounds, span=high - low, sparsity=0.0)
        self._phase(masked, data, run, "masks, sparse", self.rounds, span=high - low, sparsity=self.sparsity)
        return masked

    def _phase(
        self,
        masked: InvertibleMasks,
        data: Batches,
        run: Run,
        stage: str,
        rounds: int,
        *,
        span: float | None,
        sparsity: float,
    ) -> None:
        optimizer = torch.optim.AdamW([masked.selection, masked.masks], lr=self.lr)
        length = budget(rounds, len(data))

        def step(batch: Batch) -> StepResult:
            changed = None if span is None else self.changed(masked, batch, run, span)
            optimizer.zero_grad()
            error, logits, targets = masked.error(run, batch, changed)
            loss = error + sparsity * (1 - masked.selection).abs().mean()
            loss.backward()
            check_finite_gradients(masked.named_parameters())
            optimizer.step()
            masked.clamp()
            return task.measured(loss, logits, targets)

        run.epochs(stage, masked, data.in_batches_of(length.batch_size), step, optimizer, epochs=length.epochs)

    def changed(self, masked: InvertibleMasks, batch: Batch, run: Run, span: float) -> Batch:
        """The batch with changes that the given network falls for and the inversely masked one agrees about."""
        images = batch[0]
        with torch.no_grad():
            clean, factors = masked.given(run, batch), masked.factors(inverse=True)
        change = torch.zeros_like(images, requires_grad=True)
        optimizer = torch.optim.AdamW([change], lr=self.step_size)
        for _ in range(self.steps):
            moved = with_images(batch, images + span * change)
            led = masked.given(run, moved)
            loss = disagreeing(masked.answers(run, moved, factors), led) + agreeing(led, clean)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                change.clamp_(-1, 1)
        return with_images(batch, images + span * change.detach())

    def strengths(self, scores: NeuronScores) -> list[float]:
        """See `Pruning.strengths`; the last is the published result."""
        return [*thresholds_of(scores), 1.0]

    def apply(self, model: nn.Module, scores: NeuronScores, strength: float, data: Batches, run: Run) -> dict[str, Any]:
        """Scale channels and their biases; see `Pruning.apply`."""
        factors = torch.where(self.chosen(scores, strength), 1 - scores.values, 1.0)
        scale_channels(model, scores.index, factors, biases=True)
        return {}
