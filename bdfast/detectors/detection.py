"""`detect`: the public entry point of all detectors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bdfast import detectors
from bdfast.data.batches import Batches
from bdfast.detectors.base import BlackBox, Detector, Finding, Predict
from bdfast.detectors.calibration import Calibration, options_of, shipped
from bdfast.detectors.detection_result import Detection
from bdfast.inversion.opening import opened
from bdfast.inversion.scene import pixel_limits
from bdfast.method_options import method_of, name_of
from bdfast.task import Forward, default_forward
from bdfast.training import Run
from bdfast.training.descriptions import number, plain
from bdfast.training.modes import eval_mode
from bdfast.training.progress import Progress, as_progress
from bdfast.training.seeds import seeded

Images = Dataset[Any] | DataLoader[Any]


def detect(
    model: nn.Module | Predict,
    clean: Images,
    *,
    method: str | Detector = "surrogate",
    threshold: float | None = None,
    calibration: Calibration | None = None,
    false_alarms: float = 0.05,
    progress: bool | Progress = False,
    seed: int = 0,
    batch_size: int = 256,
    amp: bool = True,
    forward: Forward = default_forward,
    **options: Any,
) -> Detection:
    """Say whether a trained classifier looks as if it had a backdoor, from clean images alone.

    The threshold comes from what clean networks score: from `calibration`, or from the one that comes with bdfast where
    the options are the defaults; else it is the published one, and where there is none it has to be given.

    Args:
        model: Any classifier; it is left as it was. For a black-box method also a function from images [B, C, H, W] to
            probabilities [B, K].
        clean: Map-style data set of (image [C, H, W], label), or a DataLoader over one. Of more than 1,000 images most
            detectors look at so many.
        method: A name from `bdfast.list_methods("detect")`, or its options object.
        threshold: The score above which a network is suspicious.
        calibration: What clean networks of this kind score: `bdfast.detectors.calibrate`.
        false_alarms: The share of clean networks that may be accused, for a threshold from a calibration; no other
            threshold takes notice of it.
        progress: Show progress on stderr.
        seed: Fixes all randomness.
        batch_size: For a data set; a DataLoader brings its own.
        amp: Compute in bfloat16 where the device has instructions for it.
        forward: (model, (images, labels, ...)) -> (logits [B, K], targets [B]).
        **options: Fields of the method's dataclass, by name.

    Raises:
        ValueError: An argument is wrong; the message says which, what was expected, what came and what to do.
    """
    detector = method_of(method, options, detectors.METHODS, Detector)
    name = name_of(detector, detectors.METHODS)
    limit, origin, known = _threshold(name, detector, threshold, calibration, false_alarms)
    started = perf_counter()
    if isinstance(model, nn.Module):
        given: dict[str, Any] = {"seed": number(seed), "batch_size": batch_size, "amp": amp, "forward": forward}
        with opened(model, clean, progress=as_progress(progress), **given) as (batches, run), eval_mode(model):
            limits = pixel_limits(batches)
            finding = detector.run(model, batches, run)
    else:
        run = Run(seed=number(seed), progress=as_progress(progress))
        finding, limits = _ask(model, clean, detector, run, batch_size)
    return Detection(
        method=name,
        suspicious=finding.score > limit,
        score=finding.score,
        scored_by=detector.scored_by,
        threshold=limit,
        threshold_from=origin,
        false_alarms=None if known is None else known.false_alarms(limit),
        targets=finding.targets,
        evidence=finding.evidence,
        trigger=finding.trigger,
        mask=finding.mask,
        limits=limits,
        options=plain({**asdict(detector), "seed": number(seed)}),
        seconds=perf_counter() - started,
        notes=finding.notes,
    )


def calibrate(
    networks: Iterable[nn.Module],
    clean: Images,
    *,
    method: str | Detector = "surrogate",
    described: str = "networks of your own",
    seed: int = 0,
    batch_size: int = 256,
    amp: bool = True,
    forward: Forward = default_forward,
    **options: Any,
) -> Calibration:
    """What a detector gives to networks that are known to be clean, for `detect(..., calibration=...)`.

        mine = bdfast.detectors.calibrate(clean_networks, images)
        bdfast.detect(model, images, calibration=mine)

    Args:
        networks: Clean networks of the kind that is to be judged; one at a time is read, so this may be a generator. A
            share of 5 % of false alarms takes 19 of them at least.
        clean: As many images, of the same kind, as there will be.
        method: See `detect`, also for all that follows.
        described: What the networks are, for people.

    Raises:
        ValueError: There are no networks, or one cannot be read.
    """
    detector = method_of(method, options, detectors.METHODS, Detector)
    scores = []
    for network in networks:
        given: dict[str, Any] = {"seed": number(seed), "batch_size": batch_size, "amp": amp, "forward": forward}
        with opened(network, clean, **given) as (batches, run), eval_mode(network):
            scores.append(detector.run(network, batches, run).score)
    if not scores:
        raise ValueError("networks: expected clean networks, got none; train some, or use those that you trust.")
    return Calibration(name_of(detector, detectors.METHODS), options_of(detector), tuple(scores), described)


def _ask(
    answers: Predict, clean: Images, detector: Detector, run: Run, batch_size: int
) -> tuple[Finding, tuple[float, float]]:
    """A black box, on the device of the images."""
    if not isinstance(detector, BlackBox):
        known = ", ".join(name for name, cls in detectors.METHODS.items() if issubclass(cls, BlackBox))
        raise ValueError(
            f"model: expected a network for {name_of(detector, detectors.METHODS)}, which looks inside, got "
            f"{type(answers).__name__}; pass the network, or take a method for black boxes ({known})."
        )
    device = torch.device("cpu")
    batches = Batches(clean, device=device, batch_size=batch_size)
    with torch.inference_mode(False), torch.enable_grad(), seeded(run.seed, device):
        return detector.query(answers, batches, run), pixel_limits(batches)


def _threshold(
    name: str, detector: Detector, threshold: float | None, calibration: Calibration | None, false_alarms: float
) -> tuple[float, str, Calibration | None]:
    """The threshold, where it comes from, and the calibration that tells its false alarms."""
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms: expected a share in (0, 1), got {false_alarms}; 0.05 is usual.")
    options = options_of(detector)
    if calibration is not None and (calibration.method, calibration.options) != (name, options):
        raise ValueError(
            f"calibration: expected one of {name} with {options}, got one of {calibration.method} with "
            f"{calibration.options}; calibrate with the same method and options."
        )
    known = calibration or shipped(name)
    if known is not None and known.options != options:
        known = None
    if threshold is not None:
        return float(number(threshold)), "given", known
    if known is not None:
        origin = f"at most {false_alarms:.3g} of clean networks above it, by {len(known.scores)} ({known.networks})"
        return known.threshold(false_alarms), origin, known
    if detector.published_threshold is not None:
        return detector.published_threshold, f"published: {detector.paper}", None
    raise ValueError(
        f"threshold: expected one for {name} with {options}, for which no clean networks have been measured, got none; "
        "pass threshold=, or calibration= from bdfast.detectors.calibrate."
    )
