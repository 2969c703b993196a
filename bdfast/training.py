"""The one loop that every method runs on: epochs of steps, with progress, history, checkpoints and resume."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn

from bdfast.data.batches import Batch, Batches
from bdfast.evaluation import Forward, default_forward
from bdfast.journal import Journal
from bdfast.modes import eval_mode
from bdfast.progress import Progress, Silent

RECENT = 3
"""Batches over which a stage is judged while it runs."""


class StepResult(NamedTuple):
    """What a step reports: mean loss [], logits [B, K] and targets [B] of its batch."""

    loss: torch.Tensor
    logits: torch.Tensor
    targets: torch.Tensor


Step = Callable[[Batch], StepResult]
Augment = Callable[[torch.Tensor], torch.Tensor]
"""Images [B, C, H, W] -> images of the same shape; it draws from torch's generator, which the run has seeded."""


@dataclass
class Run:
    """What a method gets besides its options: randomness, precision, and where to report and store.

    Attributes:
        seed: Fixes the order of batches and everything drawn from torch's generator inside the run.
        forward: (model, batch) -> (logits, targets).
        augment: Applied to the images of every training batch of (images, ...).
        amp: Run forward passes in bfloat16 where the device computes in it.
        progress: Where to show progress.
        journal: Where to store checkpoints; None for nowhere.
        history: One row per finished epoch or probe, in order.
    """

    seed: int = 0
    forward: Forward = default_forward
    augment: Augment | None = None
    amp: bool = True
    progress: Progress = field(default_factory=Silent)
    journal: Journal | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def epochs(
        self,
        stage: str,
        model: nn.Module,
        batches: Batches,
        step: Step,
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        lr: Callable[[int], float] | None = None,
        stop: Callable[[float], bool] | None = None,
        validate: Callable[[], float] | None = None,
        patience: int | None = None,
        record: bool = True,
    ) -> float:
        """Run a stage: up to `epochs` passes over `batches`, or until `stop(accuracy)`.

        After every epoch model and optimizer go to the journal; a later call with the same journal goes on from
        there and ends with the same bits as an undisturbed one.

        Args:
            stage: Its name in history, progress and journal; unique in the run.
            model: Set to training mode before every epoch.
            batches: Shuffled anew in each epoch, by seed, stage and epoch.
            step: One update; it may use anything but hidden state that the optimizer does not hold.
            optimizer: Holds the state between steps.
            epochs: Most passes.
            lr: Learning rate of each epoch, counted from 0; that of the optimizer when left out.
            stop: Asked after every step with the accuracy of the last `RECENT` batches, as the steps saw them; True
                ends the stage there, most often well before `epochs`, so that these say nothing about the time left.
            validate: Asked after every epoch for the accuracy on held-out images; "held_out" in the history.
            patience: Ends the stage after this many epochs in which `validate` gave no new best.
            record: Put the epochs into the history.

        Returns:
            The accuracy of the last `RECENT` batches; NaN for no epochs.
        """
        saved = self.journal.load(stage) if self.journal else None
        state: dict[str, Any] = {"epoch": 0, "rows": [], "recent": [], "finished": epochs == 0}
        if saved is not None:
            model.load_state_dict(saved.pop("model"))
            optimizer.load_state_dict(saved.pop("optimizer"))
            state = saved
        with self.progress.stage(stage, None if stop else epochs) as advance:
            while not state["finished"]:
                if lr is not None:
                    for group in optimizer.param_groups:
                        group["lr"] = lr(state["epoch"])
                state["epoch"] += 1
                row, stopped = self._epoch(stage, state["epoch"], model, batches, step, state["recent"], stop)
                state["rows"].append(row)
                if validate is not None:
                    row["held_out"] = validate()
                    held_out = [earlier["held_out"] for earlier in state["rows"]]
                    stopped |= patience is not None and len(held_out) - held_out.index(max(held_out)) > patience
                state["finished"] = stopped or state["epoch"] == epochs
                if self.journal:
                    weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    self.journal.save(stage, {**state, **weights})
                advance(state["epoch"], f"accuracy {row['accuracy']:.1%}")
        if record:
            self.history.extend(state["rows"])
        return _mean(state["recent"])

    def _epoch(
        self,
        stage: str,
        epoch: int,
        model: nn.Module,
        batches: Batches,
        step: Step,
        recent: list[torch.Tensor],
        stop: Callable[[float], bool] | None,
    ) -> tuple[dict[str, Any], bool]:
        started = perf_counter()
        seed = derived_seed(self.seed, stage, epoch)
        torch.manual_seed(seed)  # inside `seeded`: dropout and augmentation, so that a resumed epoch draws the same
        model.train()
        loss_sum: Any = 0.0
        hits: Any = 0
        count = 0
        stopped = False
        for batch in batches.shuffled(seed):
            if self.augment is not None and isinstance(batch, tuple | list):
                batch = (self.augment(batch[0]), *batch[1:])
            loss, logits, targets = step(batch)
            right = logits.detach().argmax(1) == targets
            loss_sum = loss_sum + loss.detach() * len(targets)
            hits = hits + right.sum()
            count += len(targets)
            recent[:] = [*recent, right.float().mean()][-RECENT:]
            if stopped := stop is not None and len(recent) == RECENT and stop(_mean(recent)):
                break
        row = {
            "stage": stage,
            "epoch": epoch,
            "accuracy": float(hits) / count,
            "loss": float(loss_sum) / count,
            "seconds": perf_counter() - started,
        }
        return row, stopped

    def once(self, stage: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` returns, or returned in an earlier call with the same journal."""
        stored = self.journal.load(stage) if self.journal else None
        if stored is None:
            stored = compute()
            if self.journal:
                self.journal.save(stage, stored)
        return stored

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """bfloat16 for the forward passes of a step, where `amp` is on and the device computes in it."""
        if self.amp and computes_in_bfloat16(device):
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()

    def accuracy(self, model: nn.Module, batches: Batches) -> float:
        """Accuracy of `model` in eval mode."""
        hits: Any = 0
        count = 0
        with eval_mode(model), torch.inference_mode(), self.autocast(batches.device):
            for batch in batches.ordered():
                logits, targets = self.forward(model, batch)
                hits = hits + (logits.argmax(1) == targets).sum()
                count += len(targets)
        return float(hits) / count


def _mean(accuracies: list[torch.Tensor]) -> float:
    return float(torch.stack(accuracies).mean()) if accuracies else float("nan")


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; without them it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


def derived_seed(seed: int, *path: object) -> int:
    """A seed for one part of a run, the same on every machine and unrelated to those of the other parts."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators start from `seed`; after it they are where they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
