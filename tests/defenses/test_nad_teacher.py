"""The teacher of NAD, which goes on from stage to stage."""

import torch
from torch import nn

import bdfast
from bdfast.defenses import NADDefense


def test_a_teacher_that_diverges_is_as_it_was_before(trained, clean, monkeypatch):
    started = []

    def fine_tune(self, model, given, data, run, stage, **_):
        started.append((stage, model[0].weight.clone()))
        if stage == "teacher at 0.01":
            nn.init.constant_(model[0].weight, torch.nan)
            raise FloatingPointError("a gradient became NaN")
        nn.init.constant_(model[0].weight, 0.5)

    monkeypatch.setattr(NADDefense, "fine_tune", fine_tune)
    bdfast.purify(trained, clean, method=NADDefense(), amp=False)
    assert [stage for stage, _ in started[:3]] == ["teacher at 0.01", "teacher at 0.0025", "fine-tune at 0.0025"]
    assert all(torch.equal(weight, trained[0].weight) for _, weight in started[:3])


def test_a_lowered_ladder_starts_with_the_teacher_of_the_beginning(trained, clean, monkeypatch):
    started = []

    def ruin(self, model, given, data, run, stage, **_):
        started.append((stage, model[0].weight.clone()))
        nn.init.constant_(model[0].weight, 0.0)

    monkeypatch.setattr(NADDefense, "fine_tune", ruin)
    bdfast.purify(trained, clean, method=NADDefense(), amp=False)
    first = [
        weight for stage, weight in started if stage in ("teacher at 0.01", "teacher at 0.0025", "fine-tune at 0.0025")
    ]
    assert len(first) == 3
    assert all(torch.equal(weight, trained[0].weight) for weight in first)
