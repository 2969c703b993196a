import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bdfast.data.batches import Batches
from bdfast.journal import Journal, fingerprint
from bdfast.training import Run, StepResult, computes_in_bfloat16, derived_seed, seeded


def problem(count: int = 40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


class Killed(Exception):
    pass


def train(journal, *, epochs=6, kill_after=None):
    """A small training with dropout, so that hidden randomness would show; returns the weights."""
    with seeded(3, torch.device("cpu")):
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        run = Run(seed=3, amp=False, journal=journal)
        finished = 0

        def step(batch):
            nonlocal finished
            finished += 1
            if kill_after is not None and finished > kill_after:
                raise Killed
            optimizer.zero_grad()
            logits, targets = run.forward(model, batch)
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            optimizer.step()
            return StepResult(loss, logits, targets)

        batches = Batches(problem(), device="cpu", batch_size=10)
        run.epochs("fit", model, batches, step, optimizer, epochs=epochs)
    return run, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("kill_after", [1, 4, 7, 13, 23])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, kill_after):
    undisturbed_run, undisturbed = train(None)
    with pytest.raises(Killed):
        train(Journal(tmp_path, "run"), kill_after=kill_after)
    resumed_run, resumed = train(Journal(tmp_path, "run"))
    assert torch.equal(undisturbed, resumed)
    assert [(row["epoch"], row["accuracy"], row["loss"]) for row in resumed_run.history] == [
        (row["epoch"], row["accuracy"], row["loss"]) for row in undisturbed_run.history
    ]


def test_a_finished_stage_is_not_run_again(tmp_path):
    _, first = train(Journal(tmp_path, "run"))
    _, again = train(Journal(tmp_path, "run"), kill_after=0)
    assert torch.equal(first, again)


def test_a_journal_of_another_run_is_refused(tmp_path):
    train(Journal(tmp_path, "run"), epochs=1)
    with pytest.raises(ValueError, match=r"workdir: expected checkpoints of this run .* got those of a run with other"):
        train(Journal(tmp_path, "another run"))


def test_a_damaged_checkpoint_is_refused_and_a_failed_write_leaves_the_old_one(tmp_path, monkeypatch):
    journal = Journal(tmp_path, "run")
    journal.save("stage", {"epoch": 1})

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            journal.save("stage", {"epoch": 2})
    assert journal.load("stage") == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["stage.pt"]
    (tmp_path / "stage.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"workdir: expected a checkpoint of bdfast in .*stage.pt, got a file"):
        journal.load("stage")


def test_fingerprint_depends_on_weights_and_description():
    model = nn.Linear(2, 2)
    first = fingerprint(model, "a")
    assert first == fingerprint(model, "a")
    assert first != fingerprint(model, "b")
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    assert first != fingerprint(model, "a")


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
        return StepResult(model.weight.sum(), logits, targets)

    def fall():
        run = Run(amp=False, journal=Journal(tmp_path, "a"))
        reached = run.epochs("fall", model, batches, step, optimizer, epochs=10, stop=lambda recent: recent < 0.4)
        return reached, run.history

    if killed:
        with pytest.raises(KeyboardInterrupt):
            fall()
    reached, history = fall()
    assert len(taken) == 7
    assert [row["epoch"] for row in history] == [1, 2]
    assert reached == pytest.approx(1 / 3, abs=0.05)


def test_seeded_leaves_the_global_generator_where_it_was():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with seeded(7, torch.device("cpu")):
        inside = torch.rand(1)
    assert torch.equal(torch.rand(2), expected)
    with seeded(7, torch.device("cpu")):
        assert torch.equal(torch.rand(1), inside)


def test_derived_seeds_differ_and_stay():
    seeds = {derived_seed(0, "a", 1), derived_seed(0, "a", 2), derived_seed(0, "b", 1), derived_seed(1, "a", 1)}
    assert len(seeds) == 4
    assert derived_seed(0, "unlearn", 1) == derived_seed(0, "unlearn", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_bfloat16_only_where_the_device_computes_in_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False})
    assert not computes_in_bfloat16(torch.device("cpu"))
    assert not computes_in_bfloat16(torch.device("meta"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert computes_in_bfloat16(torch.device("cpu"))
