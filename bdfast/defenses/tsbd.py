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

from bdfast.batchnorm import Policy, batchnorms, kept_statistics, recalibrate
from bdfast.data.batches import Batch, Batches
from bdfast.defenses.base import Defense, Outcome
from bdfast.guided_loss import GuidedLoss
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
        unlearn_lr: Learning rate of the ascent; published: 1e-4.
        unlearn_to: What unlearning leaves of the accuracy beyond that of a constant answer, as a share; published: 0.
            What moves while the model falls apart says little about its neurons (docs/choosing-strength.md).
        unlearn_epochs: Most epochs of ascent; it ends within the epoch that reaches `unlearn_to`.
        lr: Learning rate of the fine-tuning in its first epoch; published: 0.01.
        schedule: How it falls: "cosine", to zero, or "constant", as published.
        epochs: Epochs of the fine-tuning; published: 20.
        distill: Share of the loss that asks for the answers of the model as it was given; published: 0.
        overlay: Greatest weight of another clean image laid over each; published: 0. See `bdfast.guided_loss` for both.
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

    PUBLISHED: ClassVar[dict[str, object]] = {
        "unlearn_lr": 1e-4,
        "unlearn_to": 0.0,
        "lr": 0.01,
        "schedule": "constant",
        "epochs": 20,
        "distill": 0.0,
        "overlay": 0.0,
        "bn": "official",
        "layers": "conv",
        "compat": "official",
    }
    """Those of the published code; n is not among them, as it chooses none: `purify(..., n=0.2, **TSBD.PUBLISHED)`."""

    n: float | None = None
    m: float = 0.7
    unlearn_lr: float = 1e-3
    unlearn_to: float = 0.5
    unlearn_epochs: int = 1000
    lr: float = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    epochs: int = 12
    distill: float = 0.9
    overlay: float = 0.15
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
    ladder: ClassVar[Sequence[float]] = (0.1, 0.15, 0.2, 0.25, 0.3)

    def __post_init__(self) -> None:
        for name in ("n", "m"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}: expected a share in (0, 1], got {value}; 0.15 takes 15 %.")
        for name in ("unlearn_lr", "lr", "max_accuracy_drop"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}; see its default.")

        for name, most in (("unlearn_to", 0.9), ("distill", 1.0), ("overlay", 0.49)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name}: expected a share in [0, {most:g}], got {getattr(self, name)}; see its default."
                )

    def run(self, model: nn.Module, clean: Batches, run: Run) -> Outcome:
        """Purify `model` in place; see `Defense.run`."""
        index = NeuronIndex.in_scope(model, self.layers)
        unlearned = self.unlearn(model, clean, run)
        scores = neuron_weight_change(unlearned, model, index=index)
        chosen = {}
        n = self.n
        if n is None:
            n = chosen["n"] = self.choose_n(model, unlearned, scores, clean, run)
        given = copy.deepcopy(model)
        neurons = self._reinitialize(model, scores, n, unlearned, given).neurons
        self.fine_tune(model, given, clean, run, "fine-tune", self.epochs)
        return Outcome(scores, neurons, chosen)

    def unlearn(self, model: nn.Module, clean: Batches, run: Run) -> nn.Module:
        """A copy of `model` after gradient ascent on the clean data, as far as `unlearn_to`."""
        unlearned = copy.deepcopy(model)
        optimizer = torch.optim.SGD(_trainable(unlearned), lr=self.unlearn_lr, momentum=self.momentum, maximize=True)
        ascent = GuidedLoss(run, model, distill=0, overlay=0)

        def step(batch: Batch) -> StepResult:
            optimizer.zero_grad()
            result = ascent(unlearned, ascent.prepare(batch))
            result.loss.backward()
            check_finite_gradients(unlearned.named_parameters())
            optimizer.step()
            return result

        start, constant_answer = _accuracies(model, clean, run)
        target = constant_answer + self.unlearn_to * max(0.0, start - constant_answer)
        reached = run.epochs(
            "unlearn",
            unlearned,
            clean,
            step,
            optimizer,
            epochs=self.unlearn_epochs,
            stop=lambda accuracy: accuracy <= target,
        )
        if not reached <= target:
            raise RuntimeError(
                f"unlearn_epochs: expected the clean accuracy to fall to {target:.1%}, got {reached:.1%} "
                f"after {self.unlearn_epochs} epochs; raise unlearn_lr, unlearn_to or unlearn_epochs."
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
        self.fine_tune(candidate, model, tuning, run, f"probe n={n:g}", self.probe_epochs, record=False)
        recalibrate(candidate, tuning.ordered(), run.forward)
        return run.accuracy(candidate, held_out)

    def _reinitialize(
        self, model: nn.Module, scores: NeuronScores, n: float, unlearned: nn.Module, given: nn.Module
    ) -> Reinitialized:
        return reinitialize(model, scores, n=n, m=self.m, changed=(unlearned, given), compat=self.compat)

    def fine_tune(
        self,
        model: nn.Module,
        given: nn.Module,
        data: Batches,
        run: Run,
        stage: str,
        epochs: int,
        record: bool = True,
    ) -> None:
        """Stage 2, in place: the guided loss with the penalty on the gradient norm; `given` is the teacher."""
        params = _trainable(model)
        optimizer = torch.optim.SGD(params, lr=self.lr, momentum=self.momentum)
        guided_loss = GuidedLoss(run, given, self.distill, self.overlay)
        first_pass = _unwatched if self.bn == "at_theta" else kept_statistics

        def step(batch: Batch) -> StepResult:
            if self.bn == "frozen":
                for layer in batchnorms(model):
                    layer.eval()
            optimizer.zero_grad()
            guided = guided_loss.prepare(batch)
            with first_pass(model):
                result = guided_loss(model, guided)
                result.loss.backward()
            check_finite_gradients(model.named_parameters())
            with kept_statistics(model):
                gradient_norm_gradients(
                    params,
                    lambda: guided_loss(model, guided).loss,
                    rho=self.rho,
                    alpha=self.alpha,
                    scope=self.scope,
                )
            check_finite_gradients(model.named_parameters())
            optimizer.step()
            if self.bn == "official":
                with torch.no_grad(), run.autocast(data.device):
                    run.forward(model, guided.batch)
            return result

        def lr(epoch: int) -> float:
            decay = (1 + math.cos(math.pi * epoch / epochs)) / 2 if self.schedule == "cosine" else 1.0
            return self.lr * decay

        run.epochs(stage, model, data, step, optimizer, epochs=epochs, lr=lr, record=record)
        if self.bn == "recalibrate":
            recalibrate(model, data.ordered(), run.forward)


def _unwatched(model: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _accuracies(model: nn.Module, clean: Batches, run: Run) -> tuple[float, float]:
    """Of the model, and of the best constant answer: chance, or the share of the most frequent label."""
    with eval_mode(model), torch.inference_mode(), run.autocast(clean.device):
        outputs = [run.forward(model, batch) for batch in clean.ordered()]
    targets = torch.cat([targets for _, targets in outputs])
    hits = torch.cat([logits.argmax(1) for logits, _ in outputs]) == targets
    most_frequent = float(torch.bincount(targets).max()) / len(targets)
    return float(hits.sum()) / len(targets), max(1 / outputs[0][0].shape[1], most_frequent)
