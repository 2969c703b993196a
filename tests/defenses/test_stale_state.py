"""A folder of checkpoints belongs to its samples and functions, not only to its settings."""

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import bdfast
from bdfast.training.descriptions import described


def top(x):
    return x * 0.5


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor


def test_functions_are_told_apart_by_what_they_do():
    def closing(factor):
        return lambda x: x * factor

    same = [
        (top, top),
        (closing(2), closing(2)),
        (Scale(3), Scale(3)),
        (functools.partial(top), functools.partial(top)),
    ]
    assert all(described(a, "augment") == described(b, "augment") for a, b in same)
    different = [
        top,
        closing(2),
        closing(3),
        Scale(3),
        Scale(4),
        functools.partial(top),
        lambda x: x * 0.6,
        nn.Flatten(),
    ]
    assert len({described(f, "augment") for f in different}) == len(different)
    with pytest.raises(ValueError, match=r"augment: expected something .* can be told by, got generator"):
        described(closing(x for x in "ab"), "augment")
    holding = Scale(1)
    holding.factor = holding
    with pytest.raises(ValueError, match=r"augment: .* which holds itself"):
        described(holding, "augment")


class Noisy(Dataset):
    """Other images at every reading, from a generator that bdfast does not know."""

    def __init__(self, data):
        self.data, self.draws = data, np.random.default_rng(0)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        return image + float(self.draws.normal()), label


def test_a_workdir_belongs_to_its_samples_and_functions(tmp_path, trained, digits):
    first, other = digits[1].subset(torch.arange(64)), digits[1].subset(torch.arange(64, 128))
    settings = {"method": "ft", "amp": False, "epochs": 2, "lr": 0.01, "workdir": tmp_path}
    purified = bdfast.purify(trained, first, augment=Scale(0.9), **settings)
    again = bdfast.purify(trained, first, augment=Scale(0.9), **settings)
    assert all(torch.equal(a, b) for a, b in zip(purified.model.parameters(), again.model.parameters(), strict=True))
    relabelled = bdfast.data.ImageTensors(first.images, first.labels.flip(0))
    changes = [
        (other, {"augment": Scale(0.9)}),
        (relabelled, {"augment": Scale(0.9)}),
        (first, {"augment": Scale(0.8)}),
        (first, {"augment": top}),
        (first, {"augment": Scale(0.9), "forward": lambda m, b: (m(b[0] * 1.0), b[1])}),
    ]
    for data, functions in changes:
        with pytest.raises(ValueError, match="workdir: expected checkpoints of this run"):
            bdfast.purify(trained, data, **functions, **settings)
    with pytest.raises(ValueError, match="clean: expected samples that are the same when they are read again"):
        bdfast.purify(trained, Noisy(first), augment=None, **{**settings, "workdir": tmp_path / "noisy"})
    assert bdfast.purify(trained, Noisy(first), augment=None, **{**settings, "workdir": None}).history
