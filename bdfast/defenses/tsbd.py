"""TSBD: zero what unlearning changes most, then fine-tune with a penalty on the gradient norm."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from bdfast.batchnorm import Policy, batchnorms, kept_statistics, recalibrate
from bdfast.data.batches import Batch, Batches
from bdfast.defenses.base import Defense, Outcome
from bdfast.modes import eval_mode
from bdfast.neurons import NeuronIndex
from bdfast.reinitialization import Reinitialized, reinitialize
from bdfast.scores import NeuronScores, neuron_weight_change
from bdfast.selection import strongest_within
from bdfast.sharpness import Scope, check_finite_gradients, gradient_norm_gradients
from bdfast.training import Run, StepResult, derived_seed


@dataclass(frozen=True)
class TSBD(Defense):
    """Lin et al., "Unveiling and mitigating backdoor vulnerabilities based on unlearning weight changes and backdoor
    activeness" (NeurIPS 2024, arXiv 2405.20291).

    Stage 1 unlearns the clean data in a copy (gradient ascent), zeroes in the original the sub-weights that this
    changed most in the neurons that it changed most; stage 2 fine-tunes with a penalty on the gradient norm.

    Attributes:
        n: Share of the neurons to reinitialise, in (0, 1]; left out, `bdfast.selection` chooses it from clean data.
        m: Share of their sub-weights to zero, in (0, 1].
        unlearn_lr: Learning rate of the ascent in its first epoch; published: 1e-4.
        unlearn_growth: Factor on it from epoch to epoch; published: 1. The ascent starts slowly on a converged network,
            and growing steps reach the same end in a fraction of the epochs.
        unlearn_epochs: Most epochs of ascent; it ends as soon as the model is no better than a constant answer.
        lr: Learning rate of the fine-tuning in its first epoch; published: 0.01.
        schedule: How it falls: "cosine", to zero, or "constant", as published.
        epochs: Epochs of the fine-tuning; published: 20.
        rho: Radius of the perturbation at which the second gradient is taken.
        alpha: Share of the second gradient; the penalty is alpha * rho * ||gradient||.
        scope: Radius for the gradient of every tensor by itself ("tensor", as in the published code, which left less of
            the backdoor in every comparison that we made), or of the whole model ("global", as in the paper's formula).
        momentum: Of both stages.
        bn: Which pass moves the BatchNorm statistics in stage 2; see `bdfast.batchnorm.Policy`. "official": neither of
            the two, but a third pass at the new weights.
        layers: Kind of the neurons to rank: "auto", "conv" (as published), "linear" or "attention".
        max_accuracy_drop: Budget of clean accuracy for the choice of n, as a fraction, counted from the weakest n:
            fine-tuning has a price of its own.
        compat: "official" ranks neurons by their weight change rounded to 4 decimals, as the published code does.
    """

    paper: ClassVar[str] = "Lin et al., NeurIPS 2024, arXiv 2405.20291"

    n: float | None = None
    m: float = 0.7
    unlearn_lr: float = 1e-3
    unlearn_growth: float = 1.3
    unlearn_epochs: int = 1000
    lr: float = 0.02
    schedule: Literal["cosine", "constant"] = "cosine"
    epochs: int = 12
    rho: float = 0.05
    alpha: float = 0.7
    scope: Scope = "tensor"
    momentum: float = 0.9
    bn: Policy = "at_theta"
    layers: str = "auto"
    max_accuracy_drop: float = 0.01
    compat: Literal["official"] | None = None

    probe_epochs: ClassVar[int] = 6
    probe_share: ClassVar[float] = 0.75
    ladder: ClassVar[Sequence[float]] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)

    def __post_init__(self) -> None:
        for name in ("n", "m"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], got {value}; 0.15 takes 15 %.")
        for name in ("unlearn_lr", "unlearn_growth", "lr", "max_accuracy_drop"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}; see its default.")

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Outcome:
        """Purify `model` in place; see `Defense.run`."""
        index = NeuronIndex.in_scope(model, self.layers)
        unlearned = self.unlearn(model, clean, run)
        scores = neuron_weight_change(unlearned, model, index=index)
        chosen = {}
        n = self.n
        if n is None:
            n = chosen["n"] = self.choose_n(model, unlearned, scores, clean, run)
        original = copy.deepcopy(model)
        neurons = self._reinitialize(model, scores, n, unlearned, original).neurons
        self.fine_tune(model, clean, run, "fine-tune", self.epochs)
        return Outcome(scores, neurons, chosen)

    def unlearn(self, model: nn.Module, clean: Batches, run: Run) -> nn.Module:
        """A copy of `model` that has forgotten the clean data: no better on it than a constant answer."""
        unlearned = copy.deepcopy(model)
        optimizer = torch.optim.SGD(_trainable(unlearned), lr=self.unlearn_lr, momentum=self.momentum, maximize=True)

        def step(batch: Batch) -> StepResult:
            optimizer.zero_grad()
            result = self._loss(unlearned, batch, run)
            result.loss.backward()
            check_finite_gradients(unlearned.named_parameters())
            optimizer.step()
            return result

        constant_answer = _constant_answer_accuracy(model, clean, run)
        reached = run.epochs(
            "unlearn",
            unlearned,
            clean,
            step,
            optimizer,
            epochs=self.unlearn_epochs,
            lr=lambda epoch: self.unlearn_lr * self.unlearn_growth**epoch,
            accuracy=lambda: run.accuracy(unlearned, clean),
            stop=lambda accuracy: accuracy <= constant_answer,
            open_end=True,
        )
        if not reached <= constant_answer:
            raise RuntimeError(
                f"unlearn_epochs: expected the clean accuracy to fall to {constant_answer:.1%}, got {reached:.1%} "
                f"after {self.unlearn_epochs} epochs; raise unlearn_lr, unlearn_growth or unlearn_epochs."
            )
        return unlearned

    def choose_n(self, model: nn.Module, unlearned: nn.Module, scores: NeuronScores, clean: Batches, run: Run) -> float:
        """The strongest n within the accuracy budget, by `bdfast.selection`."""
        parts = self.split(clean, run)

        def probe(n: float) -> float:
            return self.probe(n, model, unlearned, scores, parts, run)

        choice = strongest_within(self.ladder, probe, max_accuracy_drop=self.max_accuracy_drop)
        for n, accuracy in sorted(choice.probes.items()):
            kept, chosen = accuracy >= choice.floor, n == choice.strength
            run.history.append({"stage": "probe", "n": n, "accuracy": accuracy, "kept": kept, "chosen": chosen})
        return choice.strength

    def split(self, clean: Batches, run: Run) -> tuple[Batches, Batches]:
        """The part of the clean set that probes are tuned on, and the part that they are judged on."""
        return clean.split(self.probe_share, derived_seed(run.seed, "split"))

    def probe(
        self,
        n: float,
        model: nn.Module,
        unlearned: nn.Module,
        scores: NeuronScores,
        parts: tuple[Batches, Batches],
        run: Run,
    ) -> float:
        """Accuracy on the second part after a short purification with n on the first."""
        tuning, held_out = parts
        candidate = copy.deepcopy(model)
        self._reinitialize(candidate, scores, n, unlearned, model)
        self.fine_tune(candidate, tuning, run, f"probe n={n:g}", self.probe_epochs, record=False)
        recalibrate(candidate, tuning.ordered(), run.forward)
        return run.accuracy(candidate, held_out)

    def _reinitialize(
        self, model: nn.Module, scores: NeuronScores, n: float, unlearned: nn.Module, original: nn.Module
    ) -> Reinitialized:
        return reinitialize(model, scores, n=n, m=self.m, changed=(unlearned, original), compat=self.compat)

    def fine_tune(
        self, model: nn.Module, data: Batches, run: Run, stage: str, epochs: int, record: bool = True
    ) -> None:
        """Stage 2, in place: cross-entropy with the penalty on the gradient norm."""
        params = _trainable(model)
        optimizer = torch.optim.SGD(params, lr=self.lr, momentum=self.momentum)
        first_pass = _unwatched if self.bn == "at_theta" else kept_statistics

        def step(batch: Batch) -> StepResult:
            if self.bn == "frozen":
                for layer in batchnorms(model):
                    layer.eval()
            optimizer.zero_grad()
            with first_pass(model):
                result = self._loss(model, batch, run)
                result.loss.backward()
            check_finite_gradients(model.named_parameters())
            with kept_statistics(model):
                gradient_norm_gradients(
                    params,
                    lambda: self._loss(model, batch, run).loss,
                    rho=self.rho,
                    alpha=self.alpha,
                    scope=self.scope,
                )
            check_finite_gradients(model.named_parameters())
            optimizer.step()
            if self.bn == "official":
                with torch.no_grad(), run.autocast(data.device):
                    run.forward(model, batch)
            return result

        def lr(epoch: int) -> float:
            decay = (1 + math.cos(math.pi * epoch / epochs)) / 2 if self.schedule == "cosine" else 1.0
            return self.lr * decay

        run.epochs(stage, model, data, step, optimizer, epochs=epochs, lr=lr, record=record)
        if self.bn == "recalibrate":
            recalibrate(model, data.ordered(), run.forward)

    @staticmethod
    def _loss(model: nn.Module, batch: Batch, run: Run) -> StepResult:
        device = next(model.parameters()).device
        with run.autocast(device):
            logits, targets = run.forward(model, batch)
        return StepResult(F.cross_entropy(logits.float(), targets), logits, targets)


def _unwatched(model: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _constant_answer_accuracy(model: nn.Module, clean: Batches, run: Run) -> float:
    """The best accuracy that one answer for all images can have: chance, or the share of the most frequent label."""
    with eval_mode(model), torch.inference_mode():
        outputs = [run.forward(model, batch) for batch in clean.ordered()]
    counts = torch.bincount(torch.cat([targets for _, targets in outputs]))
    return max(1 / outputs[0][0].shape[1], float(counts.max()) / float(counts.sum()))
