from dataclasses import dataclass

import pytest
import torch

from bdfast.attacks import Attack, BadNets, Blended, Triggered, poisoned
from bdfast.data import ImageTensors


def images(count: int = 20, classes: int = 4, size: int = 8) -> ImageTensors:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=generator)
    return ImageTensors(pixels, torch.arange(count) % classes)


@pytest.mark.parametrize("attack", [BadNets(poison_rate=0.25), Blended(poison_rate=0.25)])
def test_poisoned_view_and_tensors_are_the_same_data(items, attack):
    data = images()
    fast, slow = poisoned(data, attack, seed=3), poisoned(items(data), attack, seed=3)
    assert torch.equal(fast.poison_indices, slow.poison_indices)
    assert len(fast.poison_indices) == 5
    assert (data.labels[fast.poison_indices] != attack.target).all()
    for index in range(20):
        (image, label), (same_image, same_label) = fast[index], slow[index]
        assert torch.equal(image, same_image)
        assert label == same_label
    changed = (fast.images != data.images).flatten(1).any(1).nonzero().squeeze(1)
    assert torch.equal(changed, fast.poison_indices)


def test_triggered_view_leaves_the_target_class_out():
    data = images()
    view = Triggered(data, BadNets(target=1))
    assert len(view) == 15
    image, target, original = view[0]
    assert (target, original) == (1, 0)
    assert torch.equal(image[..., -3:, -3:], torch.ones(1, 3, 3))
    assert torch.equal(image[..., :5], data[0][0][..., :5])


def test_triggered_view_of_a_plain_callable_needs_a_target():
    with pytest.raises(ValueError, match="target: expected a class index"):
        Triggered(images(), lambda image: image)
    assert len(Triggered(images(), lambda image: image, target=2)) == 15


def test_more_poison_than_images_is_refused():
    with pytest.raises(ValueError, match=r"poison_rate: expected at most 0.750"):
        poisoned(images(), BadNets(poison_rate=0.9))


@dataclass(frozen=True)
class CleanLabel(BadNets):
    def victims(self, labels):
        return labels == self.target


@dataclass(frozen=True)
class AllToAll(BadNets):
    def victims(self, labels):
        return torch.ones_like(labels, dtype=torch.bool)

    def relabel(self, labels):
        return (labels + 1) % 4


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("attack", [CleanLabel(target=2, poison_rate=0.2), AllToAll(poison_rate=0.5)])
def test_an_attack_says_whom_it_poisons_and_how_it_relabels(items, attack: Attack, plain):
    data = images()
    set_ = poisoned(items(data) if plain else data, attack, seed=1)
    indices = set_.poison_indices
    assert len(indices) == round(attack.poison_rate * 20)
    assert attack.victims(data.labels[indices]).all()
    labels = torch.tensor([set_[i][1] for i in range(20)])
    expected = data.labels.clone()
    expected[indices] = attack.relabel(data.labels[indices])
    assert torch.equal(labels, expected)
    assert (labels == data.labels).all() == isinstance(attack, CleanLabel)
    view = Triggered(data, attack)
    assert len(view) == (15 if isinstance(attack, CleanLabel) else 20)
    for _, target, original in view:
        assert target == int(attack.relabel(torch.tensor([original])))
        assert target != original
