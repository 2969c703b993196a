"""CLP: prune the channels that can stretch their input most, from the weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bdfast.data.batches import Batches
from bdfast.defenses.base import DataFree, Outcome
from bdfast.defenses.pruning import Pruning
from bdfast.neurons import NeuronIndex, NeuronScores
from bdfast.neurons.channels import scale_channels
from bdfast.neurons.index import SHORTCUTS
from bdfast.neurons.rules import split_neurons
from bdfast.task import at_least_float32
from bdfast.training import Run

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class CLPDefense(Pruning, DataFree):
    """Zheng et al., "Data-free backdoor removal based on channel Lipschitzness" (ECCV 2022, arXiv 2208.03111).

    A trigger needs a channel that answers a small change strongly. For a convolution with BatchNorm behind it, each
    channel's bound is the largest singular value of its kernel, as a matrix of input channels by positions, times the
    scale of BatchNorm over its deviation. In each layer the channels go whose bound lies more than u standard
    deviations above the mean.

    The convolution of a BatchNorm is the last one before it in the order of modules; one that is a shortcut by name has
    only a BatchNorm of its own block. A network without such pairs is pruned by the kernels of its convolutions and
    linear layers but the last, whose rows go (ours: the paper has BatchNorm throughout).

    Attributes:
        u: Standard deviations above the mean of a layer beyond which a channel goes; published: 3. Left out, it is
            chosen on held-out images, or 3 where there are none.
        compat: "official" pairs as the published code does, which takes the shortcut for what comes before the next
            block of a PreAct-ResNet.
    """

    paper: ClassVar[str] = "Zheng et al., ECCV 2022, arXiv 2208.03111"

    PUBLISHED: ClassVar[dict[str, Any]] = {"u": 3.0, "bn": "frozen", "compat": "official"}
    """The published run on CIFAR-10, as arguments of `purify`; u is 5 on Tiny ImageNet."""

    u: float | None = None
    compat: Literal["official"] | None = None

    scored_by: ClassVar[str] = "how much it can stretch its input"
    strength = "u"
    ladder: ClassVar[Sequence[float]] = (6.0, 5.0, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0)
    biases = True

    def __post_init__(self) -> None:
        self.check_at_least("u", 0)
        super().__post_init__()

    def repair(self, model: nn.Module, run: Run) -> Outcome:
        """See `DataFree.repair`."""
        scores = self._ranked(model)
        u = self.PUBLISHED["u"] if self.u is None else self.u
        neurons = self.chosen(scores, u)
        scale_channels(model, scores.index, ~neurons, biases=self.biases)
        return Outcome(scores, neurons, {"u": u})

    def rank(self, model: nn.Module, data: Batches, run: Run) -> NeuronScores:
        """See `Pruning.rank`; looks at no image."""
        return self._ranked(model)

    def chosen(self, scores: NeuronScores, strength: float) -> Tensor:
        """See `Pruning.chosen`."""
        chosen = torch.zeros_like(scores.values, dtype=torch.bool)
        for layer in scores.layers:
            part = scores.values[layer.start : layer.stop].double()
            if len(part) > 1:
                chosen[layer.start : layer.stop] = part > part.mean() + strength * part.std()
        return chosen

    @torch.no_grad()
    def _ranked(self, model: nn.Module) -> NeuronScores:
        named = dict(model.named_modules())
        pairs = self.pairs(model)
        if pairs:
            scales = NeuronIndex(model, kinds="norm")
            index = NeuronIndex.of(layer for layer in scales.layers if layer.module in pairs)
            bounds = [
                channel_norms(pairs[layer.module].weight) * stretch(named[layer.module]) for layer in index.layers
            ]
        else:
            index = _kernels(model)
            parameters = dict(model.named_parameters())
            bounds = [
                channel_norms(rows)
                for layer in index.layers
                for rows in split_neurons(parameters[layer.parameter], layer.split)
            ]
        return NeuronScores(torch.cat(bounds).float(), index.layers)

    def pairs(self, model: nn.Module) -> dict[str, Convolution]:
        """From the name of each BatchNorm to the convolution before it, where there is one of its size."""
        shortcuts = () if self.compat else SHORTCUTS
        pairs: dict[str, Convolution] = {}
        last: Convolution | None = None
        own: tuple[str, Convolution] | None = None
        for name, module in model.named_modules():
            block = name.rpartition(".")[0]
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                if any(fnmatchcase(name, pattern) for pattern in shortcuts):
                    own = block, module
                else:
                    last, own = module, None
            elif isinstance(module, _BatchNorm) and module.affine and module.running_var is not None:
                before = own[1] if own is not None and own[0] == block else last
                if before is not None and before.out_channels == module.num_features:
                    pairs[name] = before
        return pairs


def channel_norms(weight: Tensor) -> Tensor:
    """The largest singular value [O], float64, of each of the matrices [I, positions] of a kernel [O, I, ...].

    From the smaller of the two Gram matrices of each, all channels at once.
    """
    weight = at_least_float32(weight.detach())
    matrices = weight.flatten(2) if weight.ndim > 2 else weight[..., None]
    if matrices.shape[1] < matrices.shape[2]:
        matrices = matrices.mT
    if matrices.shape[2] == 1:
        return matrices.flatten(1).norm(dim=1).double()
    return torch.linalg.eigvalsh(matrices.mT @ matrices)[:, -1].clamp(min=0).double().sqrt()


def stretch(norm: nn.Module) -> Tensor:
    """What BatchNorm multiplies its input by [C], float64; `eps` keeps it finite where the variance is zero."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_var is not None
    return norm.weight.detach().double().abs() / (norm.running_var.double() + norm.eps).sqrt()


def _kernels(model: nn.Module) -> NeuronIndex:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return NeuronIndex(model, kinds=("conv", "linear"), exclude=linear[-1:])
