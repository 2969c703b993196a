"""The detector that looks for surrogate triggers, on networks whose trigger is known."""

import pytest
import torch
from corner_networks import CLASSES, Corner, Shift, columns

import bdfast
from bdfast.detectors.surrogate import FARTHEST


def detected(network, **options):
    return bdfast.detect(network, columns(), method="surrogate", threshold=0.2, amp=False, **options)


@pytest.mark.parametrize("target", [0, 5])
def test_a_backdoor_is_found_with_its_target(target):
    found = detected(Corner(target, 8.0))
    assert found.suspicious
    assert found.targets == (target,)
    assert found.mask is not None
    lengths = found.evidence["least length (share of the range)"]
    assert len(lengths) == CLASSES
    assert min(length for length in lengths if length == length) == lengths[target]
    # The corner is what the trigger paints.
    assert (found.picture()[0, 6:, 6:].mean() > 2 * found.picture()[0, :6].mean()) or found.trigger.abs()[
        0, 6:, 6:
    ].mean() > 2 * found.trigger.abs()[0, :6].mean()


def test_a_clean_network_scores_lower_and_has_a_score_all_the_same():
    clean, planted = detected(Corner(3, 0.0)), detected(Corner(3, 8.0))
    assert clean.score < 0.2 < planted.score
    assert clean.targets
    assert not clean.suspicious


def test_a_target_for_each_label_is_found():
    found = detected(Shift(0, 40.0))
    assert found.targets == (-1,)
    assert found.suspicious
    assert "all-to-all" in str(found)


def test_the_trigger_is_one_towards_the_first_suspect(monkeypatch):
    from bdfast.detectors import surrogate as module

    seen = []
    search = module.find_surrogates

    def two(scene, draws, targets=None):
        seen.append(search(scene, draws, targets=[5, 2]))
        return seen[-1]

    monkeypatch.setattr(module, "find_surrogates", two)
    found = detected(Corner(5, 8.0))
    own = [trigger for trigger in seen[-1].triggers if trigger.target == 5 and trigger.weight is not None]
    assert found.targets == (5, 2)
    assert any(torch.equal(found.trigger, trigger.paint) for trigger in own)


def test_no_score_is_infinite():
    """Where the search ends before a second class is reached, the next one is at least so far."""
    found = detected(Corner(2, 100.0))
    assert found.score <= 1.5 * torch.tensor(FARTHEST).log() + 1e-6


def test_the_same_seed_gives_the_same_bits():
    one, two, other = (detected(Corner(3, 4.0), seed=seed) for seed in (1, 1, 2))
    assert one.as_json() | {"seconds": 0} == two.as_json() | {"seconds": 0}
    assert torch.equal(one.trigger, two.trigger)
    assert not torch.equal(one.trigger, other.trigger)
