"""Which classes are suspects, and when they are so clearly."""

import pytest
import torch

from bdfast.inversion.least_length import GAP, LeastLengths
from bdfast.inversion.surrogates import Surrogate, Surrogates, _by_patches


def test_suspects_are_those_near_the_easiest():
    def found(*lengths: float) -> tuple[list[int], bool]:
        found = LeastLengths(torch.tensor(lengths))
        return found.suspects, found.gap >= GAP

    rest = [0.2] * 10
    assert found(0.2, 0.1, 0.21) == ([1], True)
    assert found(0.1, 0.1 * GAP - 0.001, *rest) == ([0, 1], True)
    assert found(0.1, 0.11, 0.119, *rest) == ([0, 1, 2], True)
    assert found(0.1, 0.11, 0.125, *rest) == ([0, 1], False)  # the third is near the second
    assert found(0.1, 0.11, 0.115, 0.119, *rest) == ([], False)  # four: clean networks are like that
    assert found(0.1, 0.11, 0.2, 0.2) == ([], False)  # two of four classes are half of them
    assert found(0.1, 0.11, 0.11, 0.11, 0.11, 0.11, *[0.2] * 94) == ([0, 1, 2, 3, 4, 5], True)  # 6 of 100
    assert found(0.1, *[0.11] * 6, *[0.2] * 93) == ([], False)
    assert found(torch.inf, torch.inf) == ([], False)
    assert found(torch.inf, 0.3, torch.inf) == ([1], True)
    assert found(0.1) == ([], False)


class Rated(Surrogates):
    """Has the rates that it is given in place of a scene."""

    def rates(self, scene):
        return list(scene.values())


@pytest.mark.parametrize(
    ("second", "patches", "clear"), [(0.15, (0.9, 0.4), False), (0.15, (0.5, 0.9), True), (0.11, (0.9, 0.9), False)]
)
def test_a_suspect_is_clear_where_its_length_and_every_patch_say_so(second, patches, clear):
    """0.4: the easiest class of a clean network, whose patches lead there by luck."""
    triggers = tuple(Surrogate(3, torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), (0.0, 1.0), "patch") for _ in patches)
    lengths = LeastLengths(torch.tensor([second, second, second, 0.1, 0.2, 0.2]))
    found = Rated(lengths, [3], triggers, clear=False)
    assert _by_patches(found, scene=dict(enumerate(patches))).clear == clear


def test_of_near_suspects_patches_tell():
    rates = {(3, "dense 1"): 0.9, (3, "patch"): 0.95, (6, "dense 1"): 0.9, (6, "patch"): 0.4}
    paint, weight = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    triggers = tuple(Surrogate(t, paint, weight if kind == "patch" else None, (0.0, 1.0), kind) for t, kind in rates)
    lengths = LeastLengths(torch.tensor([0.2] * 8))
    for found, kept in ((rates, [3]), ({**rates, (6, "patch"): 0.6}, [3, 6]), ({**rates, (3, "patch"): 0.7}, [3, 6])):
        narrowed = _by_patches(Rated(lengths, [3, 6], triggers, clear=False), scene=found)
        assert narrowed.targets == kept
        assert narrowed.clear == (kept == [3])
        assert {trigger.target for trigger in narrowed.triggers} == set(kept)
