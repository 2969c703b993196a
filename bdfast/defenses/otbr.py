"""OTBR: prune what unlearning of noise changes most, then fuse with the given network by optimal transport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bdfast.data.batches import Batches
from bdfast.defenses.base import DataFree, Outcome
from bdfast.defenses.parts.channel_spaces import Traced, traced
from bdfast.defenses.parts.fusion import TIE, fuse, links_in_module_order
from bdfast.defenses.parts.noise import Noise, shape_of, unlearned_noise
from bdfast.defenses.parts.trainable import trainable
from bdfast.defenses.parts.transport import pot
from bdfast.defenses.pruning import Pruning
from bdfast.neurons import NeuronIndex, NeuronScores, neuron_weight_change, prune_neurons
from bdfast.neurons.reinitialization import OFFICIAL_DECIMALS
from bdfast.task import checked_forward, device_of
from bdfast.training import Run
from bdfast.training.copies import copy_of
from bdfast.training.modes import eval_mode


@dataclass(frozen=True)
class OTBRDefense(Pruning, DataFree):
    """Lin et al., "Fusing pruned and backdoored models: optimal transport-based data-free backdoor mitigation" (AAAI
    2025, arXiv 2408.15861).

    Gradient ascent on noise with random labels, in a copy, shows which neurons change most; these are zeroed in another
    copy. From the first layer with such a neuron on, the pruned network is fused with the given one: by optimal
    transport between the neurons of the two, where those of the given one receive in proportion to their change, so
    that the suspicious ones are mixed with most others. Biases, normalisation and statistics stay those of the given
    network.

    Ours: which weights share channels is found by following a pass, so that shortcuts, depthwise convolutions and
    linear layers move along with the convolutions before them, and layers whose outputs are added share one plan. Where
    that is not clear, and in frozen layers, the order of the neurons is kept. Outputs of the network are never pruned.
    Costs are distances of weights whose inputs were not moved, as in the published code: the pruned network is a copy,
    in the same order.

    What it removes without images rests on the BatchNorm statistics of the given network: on both networks that we
    tried, the whole backdoor was back once these were estimated anew, as fine-tuning does. So with images, where this
    is done before anything is chosen, it most often leaves the network as it was.

    Attributes:
        gamma: Share of the neurons to prune, in (0, 1]; the published code tries seven values with triggered data in
            view. Left out, it is chosen on held-out images; where there are none it has to be given.
        unlearn_lr: Learning rate of the ascent.
        unlearn_steps: How many steps it has.
        unlearn_batch: Noise images in a step.
        fusion: Share of the pruned network in the fused weights.
        image_shape: Of one image, such as (3, 32, 32); needed where there are no clean images.
        compat: "official" does as the published code. Random labels leave out the last class. Changes are rounded to 4
            decimals. Only convolutions are fused, but those whose name says "shortcut", as if each read the one before
            it in the order of modules. Two things differ: what changed by nothing receives a little, where the
            published code divides by zero, and at least one neuron is pruned.
    """

    paper: ClassVar[str] = "Lin et al., AAAI 2025, arXiv 2408.15861"

    PUBLISHED: ClassVar[dict[str, Any]] = {"bn": "frozen", "compat": "official", "amp": False}
    """The published run, as arguments of `purify`; gamma is not among them, as the published code tries seven and
    chooses none."""

    gamma: float | None = None
    unlearn_lr: float = 1e-4
    unlearn_steps: int = 20
    unlearn_batch: int = 256
    fusion: float = 0.5
    image_shape: tuple[int, ...] | None = None
    compat: Literal["official"] | None = None

    scored_by: ClassVar[str] = "weight change while unlearning noise (sum of |Δw|)"
    neurons_are: ClassVar[str] = "pruned and fused"
    strength = "gamma"
    ladder: ClassVar[Sequence[float]] = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)

    def __post_init__(self) -> None:
        if self.gamma is not None and not 0 < self.gamma <= 1:
            raise ValueError(f"gamma: expected a share in (0, 1], got {self.gamma}; 0.05 prunes 5 % of the neurons.")
        self.check_positive("unlearn_lr")
        self.check_at_least("unlearn_steps", 1)
        self.check_at_least("unlearn_batch", 2)
        self.check_share("fusion")
        super().__post_init__()

    def check(self, model: nn.Module, clean: Batches, run: Run) -> None:
        """Refuse batches that noise cannot stand in for; see `Defense.check`."""
        super().check(model, clean, run)
        shape_of(clean)
        pot()

    def repair(self, model: nn.Module, run: Run) -> Outcome:
        """See `DataFree.repair`.

        Raises:
            ValueError: `image_shape` or `gamma` is missing, the shape does not fit, no neuron can be ranked, or POT is
                missing.
        """
        if self.image_shape is None:
            raise ValueError(
                "image_shape: expected the shape of an image, which noise is drawn in where there are no clean images, "
                "got None; pass it, such as image_shape=(3, 32, 32)."
            )
        if self.gamma is None:
            raise ValueError(
                "gamma: expected a share of the neurons, which nothing can choose where there are no clean images, got "
                "None; pass it, or images. The published code tries 0.01 to 0.3; from 0.2 on it ruins some networks."
            )
        shape = tuple(self.image_shape)
        scores = self._ranked(model, shape, run)
        found = self._fused(model, scores, self.gamma, shape, run)
        return Outcome(scores, self.chosen(scores, self.gamma), found=found)

    def rank(self, model: nn.Module, data: Batches, run: Run) -> NeuronScores:
        """The weight change while unlearning noise; see `Pruning.rank`."""
        return self._ranked(model, shape_of(data), run)

    def apply(self, model: nn.Module, scores: NeuronScores, strength: float, data: Batches, run: Run) -> dict[str, Any]:
        """Prune and fuse; see `Pruning.apply`."""
        return self._fused(model, scores, strength, shape_of(data), run)

    def chosen(self, scores: NeuronScores, gamma: float) -> Tensor:
        """[R] bool, the neurons that are pruned: those with the highest scores, of equal ones the earlier."""
        ranking = scores.ranking(decimals=OFFICIAL_DECIMALS if self.compat else None)
        chosen = torch.zeros_like(scores.values, dtype=torch.bool)
        chosen[ranking[: max(1, int(gamma * len(scores)))]] = True
        return chosen

    def _fused(
        self, model: nn.Module, scores: NeuronScores, gamma: float, shape: tuple[int, ...], run: Run
    ) -> dict[str, Any]:
        neurons = self.chosen(scores, gamma)
        pruned = copy_of(model)
        prune_neurons(pruned, neurons, index=scores.index)
        tie, changes = TIE, scores
        if self.compat:
            links = links_in_module_order(scores.index, model)
            scale = 10**OFFICIAL_DECIMALS
            tie, changes = 0.0, replace(scores, values=(scores.values.double() * scale).round() / scale)
        else:
            links = self._traced(model, shape, run)[0].links
        return {"aligned_layers": fuse(model, pruned, changes, neurons, links, share=self.fusion, tie=tie)}

    def _ranked(self, model: nn.Module, shape: tuple[int, ...], run: Run) -> NeuronScores:
        """Unlearn noise, and compare; `model` is only read."""
        pot()
        found, classes = self._traced(model, shape, run)
        scope = NeuronIndex.in_scope(model, "conv" if self.compat else "auto", compat=self.compat)
        ranked = trainable(scope, model, but=() if self.compat else found.returned)
        if self.compat:
            links_in_module_order(ranked, model)  # refuses a network that is no such chain
        noise = Noise(shape, max(1, classes - bool(self.compat)), self.unlearn_steps * self.unlearn_batch, run.seed)
        forgetful = unlearned_noise(model, noise, run, lr=self.unlearn_lr, batch_size=self.unlearn_batch)
        scores = neuron_weight_change(forgetful, model, index=ranked)
        if not scores.values.max() > scores.values.min():
            raise ValueError(
                f"model: expected neurons that unlearning changes in different degree, got {len(scores)} that it "
                "changed alike, so that none can be told from the others; raise unlearn_lr, or bring the model to "
                "float32 with .float()."
            )
        return scores

    def _traced(self, model: nn.Module, shape: tuple[int, ...], run: Run) -> tuple[Traced, int]:
        """Which weights share channels, and how many classes there are."""
        index = trainable(NeuronIndex(model, kinds=("conv", "linear")), model)
        device = device_of(model)
        images = torch.full((2, *shape), 0.5, device=device), torch.zeros(2, dtype=torch.long, device=device)

        def logits() -> Tensor:
            return checked_forward(model, images, run.forward, "image_shape")[0]

        with eval_mode(model):
            return traced(model, index, logits, *images), logits().shape[-1]
