import pytest
import torch

from bdfast.attacks import BadNets, Blended


def test_badnets_sets_the_square_and_nothing_else():
    images = torch.zeros(2, 3, 10, 12)
    triggered = BadNets(size=2, margin=1)(images)
    assert triggered.sum() == 2 * 3 * 4
    assert torch.equal(triggered[:, :, 7:9, 9:11], torch.ones(2, 3, 2, 2))
    assert images.sum() == 0


def test_badnets_refuses_a_square_that_does_not_fit():
    with pytest.raises(ValueError, match="size: expected a square that fits 4x4"):
        BadNets(size=5)(torch.zeros(1, 4, 4))


def test_blended_mixes_one_fixed_pattern():
    attack = Blended(alpha=0.25)
    black, white = attack(torch.zeros(2, 1, 6, 6)), attack(torch.ones(1, 1, 6, 6))
    assert torch.equal(black[0], black[1])
    torch.testing.assert_close(white[0] - black[0], torch.full((1, 6, 6), 0.75))
    assert not torch.equal(black, Blended(alpha=0.25, pattern_seed=1)(torch.zeros(2, 1, 6, 6)))


def test_blended_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Blended()(torch.zeros(1, 4, 4))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BadNets(target=-1), "target: expected a class index >= 0, got -1"),
        (lambda: BadNets(poison_rate=1.5), r"poison_rate: expected a fraction in \(0, 1\), got 1.5"),
        (lambda: Blended(alpha=0.0), r"alpha: expected a number in \(0, 1\], got 0.0"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
