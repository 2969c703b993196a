"""How many channels go is chosen on held-out images, whatever says which ones."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import bdfast
from bdfast.defenses import OTBRDefense
from bdfast.defenses.pruning import Pruning
from bdfast.neurons import NeuronScores
from bdfast.neurons.channels import channel_index
from bdfast.selection import Choice
from bdfast.training import Probe
from bdfast.training.batchnorm import recalibrate
from bdfast.training.copies import copy_of

QUICK = {"amp": False, "augment": None}


@dataclass(frozen=True)
class FirstOnes(Pruning):
    """Prunes channels in their order: the first `count` ones."""

    count: float | None = None

    strength = "count"
    ladder: ClassVar[tuple[float, ...]] = (0.5, 1.0, 1.5, 2.0, 8.0)

    def rank(self, model, data, run):
        index = channel_index(model, None)
        return NeuronScores(torch.arange(len(index), 0, -1).float(), index.layers)

    def chosen(self, scores, strength):
        return scores.values > len(scores) - int(strength)


def test_a_given_strength_prunes_so_many_and_gives_no_verdict(trained, clean):
    result = bdfast.purify(trained, clean, method=FirstOnes(count=3), **QUICK)
    assert (result.model[1].weight == 0).tolist() == [True] * 3 + [False] * 5
    assert result.neurons.tolist() == [True] * 3 + [False] * 5
    assert torch.equal(result.model[1].bias, trained[1].bias)
    assert result.verdict is None
    assert [type(row).__name__ for row in result.history] == ["Setup"]
    assert torch.equal(result.model[0].weight, trained[0].weight)


@pytest.mark.parametrize("bn", ["recalibrate", "frozen"])
def test_statistics_are_estimated_anew_or_left(trained, clean, bn):
    model = nn.Sequential(*copy_of(trained)[:3], nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))
    result = bdfast.purify(model, clean, method=FirstOnes(count=2, bn=bn), **QUICK)
    expected = copy_of(model)
    expected[1].weight.data[:2] = 0
    if bn == "recalibrate":
        batches = [(clean.images.float() / 255, clean.labels)]
        recalibrate(expected, batches, lambda network, batch: network(batch[0]))
    torch.testing.assert_close(result.model.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-5)


def test_the_ladder_skips_what_prunes_no_more_and_stops_at_the_floor(trained, clean):
    result = bdfast.purify(trained, clean, method=FirstOnes(), **QUICK)
    probes = [row for row in result.history if isinstance(row, Probe)]
    tried = [probe.value for probe in probes]
    assert tried == [1.0, 2.0, 8.0][: len(tried)]
    assert all(probe.option == "count" for probe in probes)
    assert result.options["count"] == next((probe.value for probe in probes if probe.chosen), None)
    assert result.neurons_reset == int(result.options["count"] or 0)
    # All channels gone is a network at chance: never taken.
    assert result.options["count"] != 8.0
    assert result.verdict.held_out == 24


def climbing(taken, tried):
    """In place of `climb`: goes through all steps, and takes one."""

    def climb(steps, go_on, model, judge, run, **_):
        tried.extend(steps)
        for step in steps:
            go_on(step)
        if taken is not None:
            go_on(taken)
        return Choice(taken, judge.before)

    return climb


@pytest.mark.parametrize("method", [FirstOnes(bn="frozen"), OTBRDefense(unlearn_steps=1, unlearn_batch=8, bn="frozen")])
def test_each_step_starts_from_the_given_weights(method, trained, clean, monkeypatch):
    tried: list[float] = []
    for taken in (None, 2.0 if method.strength == "count" else 0.3):
        monkeypatch.setattr("bdfast.defenses.pruning.climb", climbing(taken, tried))
        result = bdfast.purify(trained, clean, method=method, **QUICK)
        if taken is None:
            # Whatever was tried is undone.
            expected = trained
            assert result.neurons_reset == 0
            assert result.found.get("aligned_layers") is None
        else:
            expected = bdfast.purify(trained, clean, method=replace(method, **{method.strength: taken}), **QUICK).model
            assert result.neurons_reset > 0
        assert all(torch.equal(x, expected.state_dict()[name]) for name, x in result.model.state_dict().items())
    assert len(tried) >= 4


def test_inputs_that_are_no_images_are_judged_by_accuracy_alone(trained, clean):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = copy_of(trained)

        def forward(self, x):
            return self.network(x.view(-1, 1, 8, 8))

    flat = torch.utils.data.TensorDataset(clean.images.flatten(1).float() / 255, clean.labels)
    result = bdfast.purify(Flat().eval(), flat, method=FirstOnes(), **QUICK)
    assert result.verdict is None
    assert any(isinstance(row, Probe) for row in result.history)
    with pytest.raises(ValueError, match="max_accuracy_drop: expected a positive number, got 0"):
        FirstOnes(max_accuracy_drop=0)
