"""What a DataLoader decides, and what of it does not count."""

import collections
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import bdfast
from bdfast.data.batches import Batches

COUNT, CLASSES = 23, 4
VALUES = torch.rand(COUNT, 1, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(COUNT) % CLASSES


class Reader(nn.Module):
    """Says the class that the first pixel encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot((x[:, 0, 0, 0] * 1000).long() % CLASSES, CLASSES).float() * self.scale


def told(indices) -> float:
    """ACC of `Reader` on these samples, counted by hand."""
    right = [(int(VALUES[i, 0, 0, 0] * 1000) % CLASSES) == int(LABELS[i]) for i in indices]
    return sum(right) / len(right)


def read(loader) -> list[int]:
    """The indices that `Batches` uses."""
    return [int(number) for numbers, _ in Batches(loader, device="cpu").numbered() for number in numbers]


DATA = TensorDataset(VALUES, LABELS)
CHOSEN = [3, 7, 7, 20]


class Twice(Sampler):
    """No length, every index twice."""

    def __iter__(self):
        return iter([0, 0, 5, 5])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampler": SubsetRandomSampler([9, 2, 4])}, {9, 2, 4}),
        ({"sampler": CHOSEN}, {3, 7, 20}),
        ({"sampler": Twice()}, {0, 5}),
        ({"sampler": [-1, 2]}, {22, 2}),
        ({"batch_sampler": [[1, 2], [3]]}, {1, 2, 3}),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler(range(5)), 2, drop_last=True)}, {0, 1, 2, 3, 4}),
        ({"batch_size": 5, "drop_last": True}, set(range(COUNT))),
        ({"batch_size": 5, "shuffle": True}, set(range(COUNT))),
        ({"sampler": RandomSampler(DATA, num_samples=6)}, None),
    ],
    ids=["subset", "list", "own sampler", "negative", "batches", "drop last", "dropped tail", "shuffle", "few"],
)
def test_the_sampler_says_which_samples_are_used(options, expected):
    loader = DataLoader(DATA, **options)
    indices = read(loader)
    assert set(indices) == expected if expected is not None else len(indices) == 6
    assert bdfast.evaluate(Reader(), loader).acc == pytest.approx(told(indices), abs=1e-9)


def test_a_sampler_is_read_without_a_trace():
    own = torch.Generator().manual_seed(3)
    state, mine = torch.get_rng_state(), own.get_state()
    for sampler in (SubsetRandomSampler(range(9)), WeightedRandomSampler(torch.ones(COUNT), 8, generator=own)):
        read(DataLoader(DATA, sampler=sampler))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(own.get_state(), mine)


def test_what_a_loader_brings_is_kept():
    def collate(samples):
        collate.calls += 1
        return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])

    collate.calls = 0
    loader = DataLoader(DATA, batch_size=6, collate_fn=collate, timeout=0)
    batches = Batches(loader, device="cpu")
    assert [len(y) for _, y in batches.ordered()] == [6, 6, 6, 5]
    assert collate.calls == 4
    part = batches.split(0.5, 0)[0]
    assert part.collate is collate


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield 0


class Own(DataLoader):
    def __iter__(self):
        return iter([])


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DataLoader(DATA, sampler=Endless()), ValueError, "clean: expected a sampler with an end"),
        (lambda: DataLoader(DATA, sampler=[COUNT]), ValueError, "clean: expected a sampler of indices below 23"),
        (lambda: DataLoader(DATA, sampler=["a"]), TypeError, "clean: expected a sampler of integer indices"),
        (lambda: DataLoader(DATA, sampler=[]), ValueError, "clean: expected at least one sample"),
        (lambda: DataLoader(DATA, batch_size=None), TypeError, "clean: expected a DataLoader that makes batches"),
        (lambda: Own(DATA), TypeError, "clean: expected a DataLoader of torch, got Own"),
        (lambda: DataLoader(Stream()), TypeError, "clean: expected a map-style data set"),
        (lambda: DataLoader(Stream(), batch_size=None), TypeError, "clean: expected a map-style data set"),
    ],
)
def test_a_loader_that_cannot_be_read_so_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        bdfast.evaluate(Reader(), make())


class Mapped(Dataset):
    def __init__(self, change) -> None:
        self.change = change

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int):
        return self.change(VALUES[index], int(LABELS[index]))


Named = collections.namedtuple("Named", "image label")


@dataclass
class Sample:
    image: torch.Tensor
    label: int


LABEL_FORMS = {
    "int": lambda x, y: (x, y),
    "int32": lambda x, y: (x, torch.tensor(y, dtype=torch.int32)),
    "uint8": lambda x, y: (x, torch.tensor(y, dtype=torch.uint8)),
    "uint16": lambda x, y: (x, np.uint16(y)),
    "int8 of numpy": lambda x, y: (x, np.int8(y)),
    "float": lambda x, y: (x, float(y)),
    "half": lambda x, y: (x, torch.tensor(y, dtype=torch.float16)),
    "[1]": lambda x, y: (x, torch.tensor([y])),
    "float [1]": lambda x, y: (x, np.array([y], dtype=np.float64)),
    "named tuple": lambda x, y: Named(x, y),
    "dataclass": lambda x, y: Sample(x, y),
    "list": lambda x, y: [x, y],
    "float64 image": lambda x, y: (x.double(), y),
}


@pytest.mark.parametrize("form", LABEL_FORMS)
def test_labels_and_samples_of_many_forms(form):
    data = Mapped(LABEL_FORMS[form])
    assert bdfast.evaluate(Reader(), data).acc == pytest.approx(told(range(COUNT)), abs=1e-9)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    result = bdfast.purify(model, data, method="ft", epochs=1, lr=0.01, amp=False, augment=None)
    assert result.history[-1].loss > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, str(y)), "labels: expected class numbers in a tensor, got"),
        (lambda x, y: (x, y + 0.5), "labels: expected whole numbers, got torch.float64 with fractions"),
        (lambda x, y: (x, math.nan), "labels: expected whole numbers"),
        (lambda x, y: (x, nn.functional.one_hot(torch.tensor(y), CLASSES)), "one-hot or soft labels"),
        (lambda x, y: (x, torch.full((CLASSES,), 0.25)), "one-hot or soft labels"),
        (lambda x, y: (x, torch.tensor([y, y])), r"expected labels \[23\] for logits \[23, 4\], got \[23, 2\]"),
        (lambda x, y: (x, y - 1), r"expected labels 0\.\.3, .* got -1\.\.2"),
        (lambda x, y: (x[:, : 1 + y % 2], y), "expected samples that can be put into one batch"),
        (lambda x, y: (x, y, y), r"expected 1 label\(s\) per sample, got 2"),
    ],
)
@pytest.mark.parametrize("verb", [bdfast.evaluate, bdfast.purify, bdfast.invert_trigger, bdfast.surrogates])
def test_labels_that_are_none_are_refused_by_name(change, message, verb):
    data = Mapped(change)
    with pytest.raises(ValueError, match=message) as raised:
        verb(Reader(), data)
    assert str(raised.value).startswith("clean: ")


def test_labels_are_those_of_the_samples():
    class Shifted(Mapped):
        def __init__(self) -> None:
            super().__init__(lambda x, y: (x, (y + 1) % CLASSES))
            self.targets = LABELS.tolist()

    expected = (LABELS + 1) % CLASSES
    for data in (
        Shifted(),
        Subset(Shifted(), range(COUNT)),
        ConcatDataset([Shifted(), DATA]),
        ConcatDataset([Subset(DATA, [2, 1])]),
    ):
        labels = torch.tensor([int(y) for _, y in data])
        assert torch.equal(bdfast.data.labels.labels_of(data), labels)
        view = bdfast.Triggered(data, lambda x: x, target=1)
        assert [original for _, _, original in view] == labels[labels != 1].tolist()
    assert torch.equal(bdfast.data.labels.labels_of(Shifted()), expected)


def test_reading_many_labels_is_said(monkeypatch):
    monkeypatch.setattr(bdfast.data.labels, "MANY", 10)
    with pytest.warns(UserWarning, match="data: reading 23 samples of Mapped for their labels"):
        bdfast.Triggered(Mapped(lambda x, y: (x, y)), lambda x: x, target=0)
    with pytest.raises(ValueError, match=r"expected a class number as the label of sample 0, got 0.5"):
        bdfast.Triggered(Subset(Mapped(lambda x, y: (x, y + 0.5)), [0, 1]), lambda x: x, target=0)


FUZZ = 2000


@settings(max_examples=FUZZ, derandomize=True, deadline=None)
@given(
    st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=40),
    st.sampled_from(["all", "sampler", "subset", "batches", "weighted"]),
    st.sampled_from(list(LABEL_FORMS)),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_random_loaders_count_as_a_plain_loop_does(indices, kind, form, size, shuffle, drop_last, own_collate):
    data = Mapped(LABEL_FORMS[form])
    options = {"collate_fn": lambda samples: bdfast.data.batches.collate(samples)} if own_collate else {}
    if kind == "all":
        loader = DataLoader(data, batch_size=size, shuffle=shuffle, drop_last=drop_last, **options)
        expected = range(COUNT)
    elif kind == "sampler":
        loader = DataLoader(data, batch_size=size, sampler=indices, drop_last=drop_last, **options)
        expected = indices
    elif kind == "subset":
        loader = DataLoader(Subset(data, indices), batch_size=size, shuffle=shuffle, **options)
        expected = indices
    elif kind == "batches":
        groups = [indices[i : i + size] for i in range(0, len(indices), size)]
        loader = DataLoader(data, batch_sampler=groups, **options)
        expected = indices
    else:
        generator = torch.Generator().manual_seed(size)
        sampler = WeightedRandomSampler(torch.ones(COUNT), len(indices), generator=generator)
        loader = DataLoader(data, batch_size=size, sampler=sampler, **options)
        expected = list(WeightedRandomSampler(torch.ones(COUNT), len(indices), generator=generator.clone_state()))
    assert bdfast.evaluate(Reader(), loader).acc == pytest.approx(told(expected), abs=1e-9)


@pytest.mark.slow
def test_workers_give_what_the_main_process_gives():
    data = Mapped(LABEL_FORMS["int32"])
    for options in ({"persistent_workers": True}, {"prefetch_factor": 1}, {"multiprocessing_context": "fork"}):
        loader = DataLoader(data, batch_size=4, sampler=CHOSEN, num_workers=2, **options)
        assert read(loader) == CHOSEN
        assert bdfast.evaluate(Reader(), loader).acc == pytest.approx(told(CHOSEN), abs=1e-9)
