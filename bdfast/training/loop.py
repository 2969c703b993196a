"""The one loop that every method runs on: epochs of steps, with progress, history, checkpoints and resume."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import nn

from bdfast import task
from bdfast.data.batches import Batch, Batches, with_images
from bdfast.task import Forward, StepResult
from bdfast.training.history import Epoch, Row
from bdfast.training.modes import eval_mode
from bdfast.training.precision import autocast
from bdfast.training.progress import Progress, Silent
from bdfast.training.resumption import Checkpoints
from bdfast.training.seeds import derived_seed

RECENT = 3
"""Batches over which the accuracy of a running stage is averaged."""

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
        checkpoints: Where to store checkpoints; None for nowhere.
        history: One row per finished epoch or probe, in order.
        updates: Steps of optimizers in all stages so far, those of probes and of trigger inversion included.
        warnings: What speaks against trusting the result, for the caller to warn of.
    """

    seed: int = 0
    forward: Forward = task.default_forward
    augment: Augment | None = None
    amp: bool = True
    progress: Progress = field(default_factory=Silent)
    checkpoints: Checkpoints | None = None
    history: list[Row] = field(default_factory=list)
    updates: int = 0
    warnings: list[str] = field(default_factory=list)

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
        ended: Callable[[Epoch], bool] | None = None,
        validate: Callable[[], float] | None = None,
        patience: int | None = None,
        record: bool = True,
    ) -> float:
        """Run a stage: up to `epochs` passes over `batches`, or until `stop(accuracy)`.

        After every epoch model and optimizer are stored as a checkpoint; a later call with the same folder goes
        on from there and ends with the same bits as an undisturbed one.

        Args:
            stage: Its name in history, progress and checkpoints; unique in the run.
            model: Set to training mode before every epoch.
            batches: Shuffled anew in each epoch, by seed, stage and epoch.
            step: One update; it may use anything but hidden state that the optimizer does not hold.
            optimizer: Holds the state between steps.
            epochs: Most passes.
            lr: Learning rate of each epoch, counted from 0; that of the optimizer when left out.
            stop: Asked after every step with the accuracy of the last `RECENT` batches, as the steps saw them; True
                ends the stage there, most often well before `epochs`, so that these say nothing about the time left.
            ended: Asked after every epoch, with what it showed; True ends the stage.
            validate: Asked after every epoch for the accuracy on held-out images; "held_out" in the history.
            patience: Ends the stage after this many epochs in which `validate` gave no new best.
            record: Put the epochs into the history.

        Returns:
            The accuracy of the last `RECENT` batches; NaN for no epochs.
        """
        saved = self.checkpoints.load(stage) if self.checkpoints else None
        rows: list[Epoch] = []
        state: dict[str, Any] = {"recent": [], "finished": epochs == 0}
        if saved is not None:
            model.load_state_dict(saved.pop("model"))
            optimizer.load_state_dict(saved.pop("optimizer"))
            rows = [Epoch(**row) for row in saved.pop("rows")]
            state = saved
        with self.progress.stage(stage, None if stop or ended else epochs) as advance:
            while not state["finished"]:
                if lr is not None:
                    for group in optimizer.param_groups:
                        group["lr"] = lr(len(rows))
                row, stopped = self._epoch(stage, len(rows) + 1, model, batches, step, state["recent"], stop)
                rows.append(row if validate is None else replace(row, held_out=validate()))
                if patience is not None:
                    held_out = [row.held_out or 0.0 for row in rows]
                    stopped |= len(held_out) - held_out.index(max(held_out)) > patience
                stopped |= ended is not None and ended(row)
                state["finished"] = stopped or len(rows) == epochs
                if self.checkpoints:
                    weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    self.checkpoints.save(stage, {**state, **weights, "rows": [asdict(row) for row in rows]})
                advance(len(rows), f"accuracy {row.accuracy:.1%}")
        self.updates += sum(row.updates for row in rows)
        if record:
            self.history.extend(rows)
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
    ) -> tuple[Epoch, bool]:
        started = perf_counter()
        seed = derived_seed(self.seed, stage, epoch)
        torch.manual_seed(seed)  # inside `seeded`: dropout and augmentation, so that a resumed epoch draws the same
        model.train()
        loss_sum: Any = 0.0
        hits_sum: Any = 0
        count_sum: Any = 0
        stopped, updates = False, 0
        for batch in batches.shuffled(seed):
            loss, hits, total = step(self.augmented(batch))
            loss_sum = loss_sum + loss.detach() * total
            hits_sum, count_sum, updates = hits_sum + hits, count_sum + total, updates + 1
            recent[:] = [*recent, hits / total][-RECENT:]
            if stopped := stop is not None and len(recent) == RECENT and stop(_mean(recent)):
                break
        count = int(count_sum)
        seconds = perf_counter() - started
        row = Epoch(stage, epoch, float(hits_sum) / count, float(loss_sum) / count, seconds, updates)
        return row, stopped

    def augmented(self, batch: Batch) -> Batch:
        """A batch with its images augmented; one that is not (images, ...) as it is."""
        if self.augment is None or not isinstance(batch, tuple | list):
            return batch
        return with_images(batch, self.augment(batch[0]))

    def once(self, stage: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` returns, or returned in an earlier call with the same checkpoints."""
        stored = self.checkpoints.load(stage) if self.checkpoints else None
        if stored is None:
            stored = compute()
            if self.checkpoints:
                self.checkpoints.save(stage, stored)
        return stored

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """bfloat16 for the forward passes of a step, where `amp` is on and the device computes in it."""
        return autocast(device, self.amp)

    def accuracy(self, model: nn.Module, batches: Batches, *, augmented: bool = False) -> float:
        """Accuracy of `model` in eval mode, on the images as they are or `augmented` ones."""
        hits_sum: Any = 0
        count_sum: Any = 0
        with eval_mode(model), torch.inference_mode(), self.autocast(batches.device):
            for batch in batches.ordered():
                if augmented:
                    batch = self.augmented(batch)
                hits, count = task.hits(*self.forward(model, batch)[:2])
                hits_sum, count_sum = hits_sum + hits, count_sum + count
        return float(hits_sum) / int(count_sum)


def _mean(accuracies: list[torch.Tensor]) -> float:
    return float(torch.stack(accuracies).mean()) if accuracies else float("nan")
