"""Of many classes, those worth a search: the target is among them, for a fraction of the passes."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from bdfast.data.batches import Batches
from bdfast.inversion.least_length import least_lengths
from bdfast.inversion.scene import Scene, scene_of
from bdfast.inversion.screening import MOST, screened
from bdfast.inversion.target_scan import easiest_class
from bdfast.training import Run

CLASSES = 60


class Columns(nn.Module):
    """Says which of 60 columns is brightest, and `target` where the last row is lit; counts the images that it sees."""

    def __init__(self, target: int) -> None:
        super().__init__()
        self.target = target
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        lit = images[:, 0, -1].mean(1, keepdim=True)
        here = nn.functional.one_hot(torch.tensor(self.target), CLASSES)
        return self.scale * (images[:, 0, :-1].mean(1) + 8 * lit * here)


def images(classes: int = CLASSES) -> TensorDataset:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % classes
    images = 0.1 * torch.rand(240, 1, 6, CLASSES, generator=draws)
    images[torch.arange(240), 0, :-1, labels] += 0.8
    images[0, 0, -1, 0], images[1, 0, -1, 0] = 0, 1  # the limits
    return TensorDataset(images, labels)


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("target", [0, 33, 59])
def test_the_target_is_among_the_few_that_are_left(target):
    with scene_of(Columns(target), Batches(images(), device="cpu", batch_size=64), Run(amp=False)) as scene:
        left = screened(scene, torch.arange(CLASSES), draws()).tolist()
        found = least_lengths(scene, draws())
    assert target in left
    assert len(left) == len(set(left)) == MOST
    assert left == sorted(left)
    assert found.suspects == [target]
    assert found.lengths.shape == (CLASSES,)
    assert int(found.lengths.isfinite().sum()) <= MOST


def test_it_takes_a_fraction_of_the_passes(monkeypatch):
    def seen() -> int:
        network = Columns(5)
        with scene_of(network, Batches(images(), device="cpu", batch_size=64), Run(amp=False)) as scene:
            assert least_lengths(scene, draws()).suspects == [5]
        return network.seen

    some = seen()
    monkeypatch.setattr("bdfast.inversion.screening.MOST", CLASSES)
    assert some < seen() / 2


def test_few_classes_are_all_left_and_nothing_is_drawn():
    generator = draws()
    scene = Scene(lambda x: x, torch.zeros(0, 1, 1, 1), torch.zeros(0), MOST, (0.0, 1.0), 8)
    assert screened(scene, torch.arange(MOST), generator).tolist() == list(range(MOST))
    assert torch.equal(generator.get_state(), draws().get_state())


def test_a_class_that_all_images_are_of_comes_last():
    with scene_of(Columns(5), Batches(images(classes=1), device="cpu", batch_size=64), Run(amp=False)) as scene:
        left = screened(scene, torch.arange(CLASSES), draws()).tolist()
    assert 0 not in left
    assert 5 in left


def test_the_search_of_bti_dbf_takes_the_same_few():
    data = images()
    found = easiest_class(Columns(33), *data.tensors, CLASSES, limits=(0.0, 1.0), chunk=64, generator=draws())
    assert found["target"] == 33
    assert len(found["evidence"]) == CLASSES
    assert sum(loss < float("inf") for loss in found["evidence"]) == MOST
