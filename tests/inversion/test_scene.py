"""Which images a search looks at, and in what form labels may come."""

import pytest
import torch
from corner_networks import CLASSES, Corner, columns
from torch.utils.data import DataLoader, TensorDataset

from bdfast.data.batches import Batches
from bdfast.inversion.least_length import least_lengths
from bdfast.inversion.scene import MOST_IMAGES, gathered, scene_of
from bdfast.training import Run

MANY = 2 * MOST_IMAGES


def by_class(count: int) -> TensorDataset:
    images, labels = columns(count).tensors
    order = labels.argsort(stable=True)
    return TensorDataset(images[order], labels[order])


@pytest.mark.parametrize("make", [lambda data: data, lambda data: DataLoader(data, batch_size=100)])
def test_data_that_is_sorted_by_class_is_seen_from_all_classes(make):
    """As folders are: the first thousand images would have half of the classes."""
    sorted_ = Batches(make(by_class(MANY)), device="cpu", batch_size=64)
    images, labels, _ = gathered(sorted_, MOST_IMAGES)
    counts = labels.bincount(minlength=CLASSES)
    assert len(images) >= MOST_IMAGES
    assert counts.min() > 0.7 * MOST_IMAGES / CLASSES
    assert torch.equal(images[:, 0, :6].mean(1).argmax(1), labels)
    again = gathered(sorted_, MOST_IMAGES)
    assert torch.equal(images, again[0])


def test_the_target_is_found_in_data_that_is_sorted_by_class():
    with scene_of(Corner(CLASSES - 1, 8.0), Batches(by_class(MANY), device="cpu", batch_size=64), Run()) as scene:
        found = least_lengths(scene, torch.Generator().manual_seed(0))
    assert found.suspects == [CLASSES - 1]


def test_data_that_is_mixed_is_read_from_its_beginning():
    data = columns(MANY)
    images, labels, _ = gathered(Batches(data, device="cpu", batch_size=64), MOST_IMAGES)
    assert torch.equal(images, data.tensors[0][: len(images)])
    assert torch.equal(labels, data.tensors[1][: len(images)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_labels_may_be_whole_numbers_of_any_type(dtype, shape):
    images, labels = columns().tensors
    data = TensorDataset(images, labels.to(dtype).view(shape))
    found = gathered(Batches(data, device="cpu", batch_size=64), MOST_IMAGES)[1]
    assert found.dtype == torch.int64
    assert torch.equal(found, labels)
