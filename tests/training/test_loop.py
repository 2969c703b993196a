from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bdfast import task
from bdfast.data.batches import Batches
from bdfast.training import Run
from bdfast.training.resumption import Checkpoints
from bdfast.training.seeds import seeded


def problem(count: int = 40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


class Killed(Exception):
    pass


def train(checkpoints, *, epochs=6, kill_after=None):
    """A small training with dropout, so that hidden randomness would show; returns the weights."""
    with seeded(3, torch.device("cpu")):
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        run = Run(seed=3, amp=False, checkpoints=checkpoints)
        finished = 0

        def step(batch):
            nonlocal finished
            finished += 1
            if kill_after is not None and finished > kill_after:
                raise Killed
            optimizer.zero_grad()
            logits, targets = run.forward(model, batch)
            loss = task.cross_entropy(logits, targets)
            loss.backward()
            optimizer.step()
            return task.measured(loss, logits, targets)

        batches = Batches(problem(), device="cpu", batch_size=10)
        run.epochs("fit", model, batches, step, optimizer, epochs=epochs)
    return run, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("kill_after", [1, 4, 7, 13, 23])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, kill_after):
    undisturbed_run, undisturbed = train(None)
    with pytest.raises(Killed):
        train(Checkpoints(tmp_path, "run"), kill_after=kill_after)
    resumed_run, resumed = train(Checkpoints(tmp_path, "run"))
    assert torch.equal(undisturbed, resumed)
    assert [replace(row, seconds=0.0) for row in resumed_run.history] == [
        replace(row, seconds=0.0) for row in undisturbed_run.history
    ]
    assert undisturbed_run.updates == resumed_run.updates == 6 * 4


def test_a_finished_stage_is_not_run_again(tmp_path):
    _, first = train(Checkpoints(tmp_path, "run"))
    _, again = train(Checkpoints(tmp_path, "run"), kill_after=0)
    assert torch.equal(first, again)


def test_checkpoints_of_another_run_are_refused(tmp_path):
    train(Checkpoints(tmp_path, "run"), epochs=1)
    with pytest.raises(ValueError, match=r"workdir: expected checkpoints of this run .* got those of a run with other"):
        train(Checkpoints(tmp_path, "another run"))


@pytest.mark.parametrize("killed", [False, True])
def test_a_stage_stops_within_an_epoch(tmp_path, killed):
    """Five batches an epoch, each half right until the seventh batch is all wrong: the mean of three tells."""
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = Batches(problem(), device="cpu", batch_size=-(-len(problem()) // 5))
    taken, kill = [], [5] if killed else []

    def step(batch):
        if kill and len(taken) == kill[0]:
            kill.clear()
            raise KeyboardInterrupt
        targets = batch[1]
        right = torch.arange(len(targets)) % 2 == 0 if len(taken) < 6 else torch.zeros(len(targets), dtype=torch.bool)
        taken.append(len(targets))
        logits = F.one_hot(torch.where(right, targets, 1 - targets), 2).float()
        return task.measured(model.weight.sum(), logits, targets)

    def fall():
        run = Run(amp=False, checkpoints=Checkpoints(tmp_path, "a"))
        reached = run.epochs("fall", model, batches, step, optimizer, epochs=10, stop=lambda recent: recent < 0.4)
        return reached, run.history

    if killed:
        with pytest.raises(KeyboardInterrupt):
            fall()
    reached, history = fall()
    assert len(taken) == 7
    assert [row.epoch for row in history] == [1, 2]
    assert reached == pytest.approx(1 / 3, abs=0.05)
