"""Evaluation: ACC, ASR and RA in one pass over each set; DER and RIR against a baseline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bdfast.data.batches import Batches
from bdfast.data.cache import CachedPasses
from bdfast.task import Forward, checked_forward, default_forward, device_of, hits, normalized
from bdfast.training.batchnorm import batchnorms, recalibrate
from bdfast.training.copies import copy_of
from bdfast.training.modes import eval_mode

CACHE_BYTES = 2 << 30
"""A test set that needs more device memory than this is read anew for every evaluation."""


@dataclass(frozen=True)
class Metrics:
    """Fractions in [0, 1]; None where there was nothing to measure them on.

    Attributes:
        acc: Clean images that are classified right.
        asr: Attack success rate: triggered images classified as the target label.
        ra: Robust accuracy: the same images classified as their original label.
        der: Defense effectiveness rate against a baseline:
            (max(0, ASR_before - ASR) - max(0, ACC_before - ACC) + 1) / 2.
        rir: Robustness improvement rate, the same with the gain of RA in place of the fall of ASR.
    """

    acc: float
    asr: float | None = None
    ra: float | None = None
    der: float | None = None
    rir: float | None = None

    def against(self, baseline: Metrics) -> Metrics:
        """The same figures with DER and RIR filled in (definitions of BackdoorBench, NeurIPS 2022)."""
        lost = max(0.0, baseline.acc - self.acc)
        der = rir = None
        if self.asr is not None and baseline.asr is not None:
            der = (max(0.0, baseline.asr - self.asr) - lost + 1) / 2
        if self.ra is not None and baseline.ra is not None:
            rir = (max(0.0, self.ra - baseline.ra) - lost + 1) / 2
        return Metrics(self.acc, self.asr, self.ra, der, rir)

    def as_dict(self) -> dict[str, float | None]:
        """The five figures by name."""
        return asdict(self)


class Evaluator:
    """Evaluates several models on the same data, which is decoded once and then kept on the device as uint8.

    Args:
        clean: Test set of (image, label).
        triggered: Set of (triggered image, target label, original label), such as `bdfast.data.Triggered`.
        device: Where the models live.
        batch_size: Images in one forward pass.
        cache_bytes: Device memory that the two sets may take together; what does not fit is read anew each time.
        forward: (model, batch) -> (logits, labels) and, on triggered batches, (logits, target labels, original labels).
    """

    def __init__(
        self,
        clean: Dataset[Any] | DataLoader[Any],
        triggered: Dataset[Any] | DataLoader[Any] | None = None,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 500,
        cache_bytes: int = CACHE_BYTES,
        forward: Forward = default_forward,
    ) -> None:
        def passes(data: Dataset[Any] | DataLoader[Any], name: str, budget: int) -> CachedPasses:
            return CachedPasses(Batches(data, device=device, batch_size=batch_size, name=name), budget)

        share = cache_bytes // 2 if triggered is not None else cache_bytes
        self.clean = passes(clean, "clean", share)
        self.triggered = passes(triggered, "triggered", share) if triggered is not None else None
        self.forward = normalized(forward)

    def __call__(
        self, model: nn.Module, *, baseline: Metrics | None = None, recalibrate_on: Batches | None = None
    ) -> Metrics:
        """The figures of `model`, which is left as it was.

        Args:
            model: Any classifier.
            baseline: Figures of the model before the defense, for DER and RIR.
            recalibrate_on: Clean images, not those of the test, on which a copy of the model estimates its BatchNorm
                statistics anew before it is evaluated. A defense whose effect does not survive this has removed
                nothing.
        """
        if recalibrate_on is not None and batchnorms(model):
            model = copy_of(model)
            recalibrate(model, recalibrate_on.ordered(), self.forward)
        with eval_mode(model), torch.inference_mode():
            acc = self._fractions(model, self.clean)[0]
            asr = ra = None
            if self.triggered is not None:
                asr, ra = self._fractions(model, self.triggered, labels=2)
        metrics = Metrics(acc, asr, ra)
        return metrics if baseline is None else metrics.against(baseline)

    def _fractions(self, model: nn.Module, passes: CachedPasses, labels: int = 1) -> list[float]:
        """Of each of the label columns, the fraction that the predictions equal."""
        counts: torch.Tensor | int = 0
        for logits, columns in _predictions(model, passes, self.forward, labels):
            counts = counts + torch.stack([torch.stack(hits(logits, column)) for column in columns])
        return [right / count for right, count in counts.tolist()]  # type: ignore[union-attr]


def evaluate(
    model: nn.Module,
    clean: Dataset[Any] | DataLoader[Any],
    triggered: Dataset[Any] | DataLoader[Any] | None = None,
    *,
    baseline: Metrics | None = None,
    recalibrate_on: Dataset[Any] | DataLoader[Any] | None = None,
    batch_size: int = 500,
    forward: Forward = default_forward,
) -> Metrics:
    """Evaluate one model: ACC on `clean`; ASR and RA on `triggered`; DER and RIR against `baseline`.

    Each set is read once. To evaluate several models on the same data, make an `Evaluator`, which keeps it.

    Args:
        model: Any classifier; its device is used, and it is left as it was.
        clean: Test set or loader of (image, label).
        triggered: Set or loader of (triggered image, target label, original label).
        baseline: Figures before the defense.
        recalibrate_on: Clean images, not those of the test, on which a copy of the model estimates its BatchNorm
            statistics anew before it is evaluated.
        batch_size: Images in one forward pass; a loader brings its own.
        forward: For batches of another form; see `Evaluator`.

    Raises:
        ValueError: A set is empty, labels do not fit the logits, or the model gives NaN.
    """
    device = device_of(model)
    evaluator = Evaluator(clean, triggered, device=device, batch_size=batch_size, cache_bytes=0, forward=forward)
    recalibration = None
    if recalibrate_on is not None:
        recalibration = Batches(recalibrate_on, device=device, batch_size=batch_size, name="recalibrate_on")
    return evaluator(model, baseline=baseline, recalibrate_on=recalibration)


def _predictions(
    model: nn.Module, passes: CachedPasses, forward: Forward, labels: int
) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    for index, batch in enumerate(passes):
        yield checked_forward(model, batch, forward, f"{passes.name}: batch {index}", labels=labels)
