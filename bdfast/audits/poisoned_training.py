"""Fine-tuning on poisoned images, with what the network shows on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bdfast.audits.case import Case
from bdfast.audits.rates import Figures
from bdfast.data.batches import Batch, Batches
from bdfast.ops.finite import check_finite_gradients
from bdfast.task import StepResult, cross_entropy, measured
from bdfast.training import Epoch, Run
from bdfast.training.copies import copy_of

Curve = tuple[tuple[int, Figures], ...]
"""(number of updates, what the network shows then), in order."""


def trained_copy(
    network: nn.Module,
    data: Batches,
    case: Case,
    run: Run,
    stage: str,
    *,
    lr: float,
    momentum: float,
    epochs: int,
    most: int | None = None,
    every: int | None = None,
    until: float | None = None,
    first: Figures | None = None,
) -> tuple[nn.Module, Curve]:
    """A copy of the network, fine-tuned with SGD in all parameters but integers; the network is not changed.

    Args:
        network: In eval mode; the copy ends so, too.
        data: Poisoned batches, read in training mode.
        case: Measures the copy.
        run: Seed, precision, progress, checkpoints.
        stage: Name in these.
        lr: Learning rate.
        momentum: Of SGD.
        epochs: Most passes.
        most: Most updates.
        every: Measure after so many updates each, and after `most`; after every epoch, if left out.
        until: End as soon as the rate is that high.
        first: What `network` shows, where that is known.

    Returns:
        The copy, and what it showed, the start included.
    """
    copied = copy_of(network)
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    optimizer = torch.optim.SGD(copied.parameters(), lr=lr, momentum=momentum)
    _group(optimizer)["updates"] = 0
    log = _stored(run, stage) or {0: first or case.figures(network)}
    _store(run, stage, log)

    def measure() -> None:
        log[_group(optimizer)["updates"]] = case.figures(copied)
        _store(run, stage, log)

    def over() -> bool:
        done = _group(optimizer)["updates"]
        known = [x.rate or 0.0 for updates, x in log.items() if updates <= done]  # a run that was killed knew more
        return (most is not None and done >= most) or (until is not None and max(known) >= until)

    def step(batch: Batch) -> StepResult:
        optimizer.zero_grad()
        with run.autocast(data.device):
            logits, targets = run.forward(copied, batch)[:2]
        loss = cross_entropy(logits, targets)
        loss.backward()
        check_finite_gradients(copied.named_parameters())
        optimizer.step()
        group = _group(optimizer)
        group["updates"] += 1
        if every is not None and (group["updates"] % every == 0 or group["updates"] == most):
            measure()
        return measured(loss, logits, targets)

    def ended(row: Epoch) -> bool:
        if every is None:
            measure()
        return over()

    if not over():
        run.epochs(stage, copied, data, step, optimizer, epochs=epochs, stop=lambda _: over(), ended=ended)
    # The loop asks whether to stop from its third step on, which may be beyond `most`.
    done = min(_group(optimizer)["updates"], most or float("inf"))
    copied.zero_grad()
    return copied.eval().requires_grad_(False), tuple((n, log[n]) for n in sorted(log) if n <= done)


def _group(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The first one, which is stored with the optimizer; `load_state_dict` puts another one in its place."""
    return optimizer.param_groups[0]


def _stored(run: Run, stage: str) -> dict[int, Figures]:
    stored = run.checkpoints.load(f"{stage} figures") if run.checkpoints else None
    return {} if stored is None else {int(n): Figures(acc, rate) for n, acc, rate in stored["rows"]}


def _store(run: Run, stage: str, log: dict[int, Figures]) -> None:
    if run.checkpoints:
        run.checkpoints.save(f"{stage} figures", {"rows": [[n, x.acc, x.rate] for n, x in log.items()]})
