"""Scenarios of attacks that make their trigger with a network."""

from dataclasses import replace

import pytest
import torch

import bdfast
from bdfast import scenario
from bdfast.attacks import LabelConsistent, LowFrequency
from bdfast.attacks.trigger_files import trigger_path
from bdfast.data.digits import digits_source
from bdfast.data.sources import SOURCES


@pytest.fixture(autouse=True)
def one_epoch(monkeypatch):
    monkeypatch.setitem(SOURCES, "digits", lambda: replace(digits_source(), epochs=1))


def test_the_trigger_is_kept_beside_the_weights(tmp_path):
    weights = tmp_path / "new" / "net.safetensors"
    attack = LowFrequency(target=3, steps=3)
    first = scenario.backdoored(attack, data="digits", weights=weights, seed=2)
    assert attack.state is None
    assert trigger_path(weights).exists()
    image, target, _ = first.triggered[0]
    assert target == 3
    assert image.max() > 0

    again = scenario.backdoored(attack, data="digits", weights=weights, seed=2)
    assert torch.equal(again.attack.state["pattern"], first.attack.state["pattern"])
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in first.model.state_dict().items())
    assert torch.equal(again.triggered[0][0], image)

    trigger_path(weights).unlink()
    with pytest.raises(ValueError, match=r"trigger: expected the trigger of LowFrequency in .* got no such file"):
        scenario.backdoored(attack, data="digits", weights=weights, seed=2)


def test_a_plan_has_no_trigger_yet_and_a_prepared_attack_stays_as_it_is(monkeypatch):
    planned = scenario.plan("lf", data="digits")
    assert len(planned.triggered) > 0
    with pytest.raises(ValueError, match="attack: expected a LowFrequency with its trigger"):
        planned.triggered[0]
    given = LowFrequency().with_state({"pattern": torch.full((1, 8, 8), 0.1)})
    monkeypatch.setattr(LowFrequency, "prepare", None)
    planted = scenario.backdoored(given, data="digits")
    assert planted.attack is given


def test_what_cannot_be_poisoned_is_refused_before_any_training(monkeypatch):
    monkeypatch.setattr(scenario, "fit", None)
    with pytest.raises(ValueError, match=r"poison_rate: expected at most 0\.1"):
        scenario.backdoored(LabelConsistent(poison_rate=0.5), data="digits")


def test_the_clean_network_is_another_one_than_the_backdoored(monkeypatch):
    """What it learns is clean, and its weights come from a seed of their own."""
    seen = []
    real = scenario.fit

    def spy(model, data, **options):
        seen.append((model.state_dict()["network.conv1.weight"].clone(), data, options["seed"]))
        return real(model, data, **options)

    monkeypatch.setattr(scenario, "fit", spy)
    planted = scenario.backdoored(LowFrequency(steps=1), data="digits", seed=1)
    (clean_weights, clean, clean_seed), (weights, poisoned, seed) = seen
    assert clean is planted.attacker
    assert not torch.equal(clean.images, poisoned.images)
    assert not torch.equal(clean_weights, weights)
    assert clean_seed != seed == 1
    plain = bdfast.BadNets()
    seen.clear()
    scenario.backdoored(plain, data="digits", seed=1)
    assert len(seen) == 1
    assert torch.equal(seen[0][0], weights)
