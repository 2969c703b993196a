"""Checkpoints of audits: a killed one goes on, and those of another run are refused."""

import pytest
import torch
from audit_cases import ATTACK, QUICK, figures, forgotten, stale

import bdfast
from bdfast.audits import RelearningAudit, RetuningAudit
from bdfast.audits.case import Case
from bdfast.training.resumption import Checkpoints


def test_an_audit_that_was_killed_goes_on(planted, clean, shown, tmp_path, monkeypatch):
    after = forgotten(planted, clean)
    arguments = {"methods": QUICK, "batch_size": 16}
    expected = figures(bdfast.audit(planted, after, clean, shown, **arguments))
    measure, calls = Case.figures, []

    def killed(self, model, **options):
        calls.append(1)
        if len(calls) % 4 == 0:
            raise KeyboardInterrupt
        return measure(self, model, **options)

    monkeypatch.setattr(Case, "figures", killed)
    with pytest.raises(KeyboardInterrupt):
        bdfast.audit(planted, after, clean, shown, workdir=tmp_path, **arguments)
    assert len(calls) == 4
    monkeypatch.setattr(Case, "figures", measure)
    for _ in range(2):
        assert figures(bdfast.audit(planted, after, clean, shown, workdir=tmp_path, **arguments)) == expected


@pytest.mark.parametrize("stage", ["retuning after", "relearning after", "reactivation"])
def test_every_stage_goes_on_from_its_last_epoch(planted, clean, shown, tmp_path, monkeypatch, stage):
    after = forgotten(planted, clean)
    arguments = {"methods": QUICK, "batch_size": 16}
    expected = figures(bdfast.audit(planted, after, clean, shown, **arguments))
    epoch, seen = bdfast.training.Run._epoch, []

    def interrupted(self, name, number, *rest):
        seen.append((name, number))
        if (name, number) == (stage, 2) and seen.count((stage, 2)) == 1:
            raise KeyboardInterrupt
        return epoch(self, name, number, *rest)

    monkeypatch.setattr(bdfast.training.Run, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bdfast.audit(planted, after, clean, shown, workdir=tmp_path, **arguments)
    assert figures(bdfast.audit(planted, after, clean, shown, workdir=tmp_path, **arguments)) == expected
    assert seen.count((stage, 1)) == 1
    assert seen.count((stage, 2)) == 2


def test_what_a_killed_run_knew_beyond_its_checkpoint_does_not_end_the_next(
    planted, clean, shown, tmp_path, monkeypatch
):
    after = forgotten(planted, clean)
    arguments = {"methods": RelearningAudit(every=1, batch_size=16, lr=0.05, updates=20), "batch_size": 16}
    expected = figures(bdfast.audit(planted, after, clean, shown, **arguments))
    assert expected["results"]["relearning"]["updates"] > 0
    save = Checkpoints.save

    def killed(self, stage, content):
        if stage == "relearning after":
            raise KeyboardInterrupt
        save(self, stage, content)

    monkeypatch.setattr(Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        bdfast.audit(planted, after, clean, shown, workdir=tmp_path, **arguments)
    monkeypatch.setattr(Checkpoints, "save", save)
    assert figures(bdfast.audit(planted, after, clean, shown, workdir=tmp_path, **arguments)) == expected


def test_a_surrogate_is_found_once(planted, clean, tmp_path, monkeypatch):
    arguments = {"methods": "batch_statistics", "target": ATTACK.target, "batch_size": 16, "workdir": tmp_path}
    expected = figures(bdfast.audit(planted, stale(planted), clean, **arguments))
    monkeypatch.setattr("bdfast.audits.case.find_surrogates", None)
    assert figures(bdfast.audit(planted, stale(planted), clean, **arguments)) == expected


@pytest.mark.parametrize("changing", ["clean", "test", "triggered"])
def test_samples_that_change_are_refused(planted, clean, shown, tmp_path, changing):
    class Changing(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return len(clean)

        def __getitem__(self, index):
            self.reads += 1
            image, label = clean[index][:2]
            return image * (1 - self.reads % 997 / 1000), int(label)

    data = Changing()
    given = {"clean": clean, "triggered": shown, "test": shown.data}
    given[changing] = bdfast.Triggered(data, ATTACK) if changing == "triggered" else data
    bdfast.audit(planted, stale(planted), methods="batch_statistics", **given)
    with pytest.raises(ValueError, match=f"{changing}: expected samples that are the same when they are read again"):
        bdfast.audit(planted, stale(planted), methods="batch_statistics", workdir=tmp_path, **given)
    assert not any(tmp_path.iterdir())


def test_checkpoints_of_another_run(planted, innocent, clean, shown, tmp_path):
    method = RetuningAudit(epochs=1)
    after = forgotten(planted, clean)
    bdfast.audit(planted, after, clean, shown, methods=method, workdir=tmp_path)
    for changed in (
        {"after": innocent},
        {"clean": clean.subset(torch.arange(72))},
        {"triggered": bdfast.Triggered(shown.data, bdfast.BadNets(size=3))},
        {"seed": 1},
        {"methods": RetuningAudit(epochs=2)},
        {"clean_model": innocent},
        {"test": clean},
    ):
        given = {"before": planted, "after": after, "clean": clean, "triggered": shown, "methods": method} | changed
        with pytest.raises(ValueError, match="workdir: expected checkpoints of this run"):
            bdfast.audit(**given, workdir=tmp_path)
