"""What a grid asks of its images, found out before anything trains."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import bdfast
from bdfast.data.data_source import SourceUnavailable
from bdfast.data.digits import digits_source
from bdfast.data.sources import SOURCES
from bdfast.matrix import GridError, check_grid, parse_grid
from bdfast.matrix.shares import drawn, order
from bdfast.models import register_model


def test_the_attacker_never_sees_what_the_defender_can_have():
    labels = digits_source().train.labels
    attacker, aside = order(len(labels), 3)
    assert len(aside) == 150
    assert torch.equal(torch.cat([attacker, aside]).sort().values, torch.arange(1500))
    small, large = (drawn(labels, 3, num_classes=10, share=share) for share in (0.01, 0.05))
    assert (len(small), len(large)) == (15, 75)
    assert torch.equal(large[:15], small)
    each = drawn(labels, 3, num_classes=10, per_class=7)
    assert labels[each].bincount().tolist() == [7] * 10
    assert set(each.tolist()) | set(large.tolist()) <= set(aside.tolist())
    assert not torch.equal(order(1500, 4)[1], aside)


def test_facts_of_the_images(small):
    facts = check_grid(small)["digits"]
    assert facts.num_classes == 10
    assert facts.shape == (1, 8, 8)
    assert len(facts.digest) == 64


def register_odd_ones():
    @bdfast.register("poison", "odd")
    @dataclass(frozen=True)
    class Odd(bdfast.BadNets):
        """Clean-label, or larger images.

        Attributes:
            clean_label: Poison the target class.
            crop: Return smaller images.
        """

        clean_label: bool = False
        crop: bool = False

        def __call__(self, images):
            return super().__call__(images)[..., self.crop :, :]

        def victims(self, labels):
            return labels == self.target if self.clean_label else labels != self.target

    register_model("deaf", lambda spec: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))


@pytest.mark.parametrize(
    ("key", "line", "message"),
    [
        (
            "networks",
            "networks: [resnet18]",
            r"line 3, networks\[0\]: expected a network that takes images \[1, 8, 8\]",
        ),
        ("networks", "networks: [deaf]", r"networks\[0\]: expected 10 outputs for digits, got \[3\]"),
        (
            "attacks",
            "attacks: [{attack: badnets, target: 10}]",
            r"line 5, attacks\[0\], with digits: target: expected a class from 0 to 9, got 10",
        ),
        ("attacks", "attacks: [{attack: none, trigger: {attack: badnets, target: 12}}]", "from 0 to 9, got 12"),
        (
            "attacks",
            "attacks: [{attack: none, trigger: lf}]",
            "trigger: expected one that needs no network, got lf",
        ),
        ("attacks", "attacks: [{attack: badnets, size: 9}]", r"size: expected a \w+ that fits 8x8 pixels"),
        ("attacks", "attacks: [{attack: badnets, poison_rate: 0.0001}]", "poison_rate: expected from 1 to 121. images"),
        ("attacks", "attacks: [{attack: odd, clean_label: true, poison_rate: 0.2}]", "got 0.2, which is 270; choose"),
        ("attacks", "attacks: [{attack: odd, crop: true}]", r"expected triggered images \[2, 1, 8, 8\], got"),
        (
            "clean",
            "clean: [{per_class: 30}]",
            r"line 6, clean\[0\], with digits: clean: expected at most \d+ images a class",
        ),
        ("clean", "clean: [0.0001]", "clean: expected at least one image, got none"),
        (
            "clean",
            "clean: [0.1, none]",
            r"line 6, clean\[1\]: expected a defense that needs no images \(.*clp.*\), got ft",
        ),
    ],
)
def test_what_cannot_be_had_is_named_with_its_line(change, key, line, message):
    register_odd_ones()
    with pytest.raises(GridError, match=message):
        check_grid(parse_grid(change(key, line), "small.yaml"))


def test_no_other_images_in_place_of_those_that_cannot_be_had(change, monkeypatch):
    monkeypatch.setitem(SOURCES, "fashion-mnist", digits_source)
    with pytest.raises(SourceUnavailable, match="data: expected fashion-mnist, got scikit-learn's digits"):
        check_grid(parse_grid(change("data", "data: [fashion-mnist]")))
