import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bdfast.data import ImageTensors, fashion_mnist
from bdfast.data.batches import Batches
from bdfast.data.cache import CachedPasses
from bdfast.data.images import to_float, to_uint8
from bdfast.data.named_sets import named_data


def images(count: int = 20, classes: int = 4, size: int = 8) -> ImageTensors:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=generator)
    return ImageTensors(pixels, torch.arange(count) % classes)


class Items(torch.utils.data.Dataset):
    """A plain data set: the slow path of everything that has a fast one for `ImageTensors`."""

    def __init__(self, data: ImageTensors) -> None:
        self.data, self.reads = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        self.reads += 1
        return self.data[index]


def test_uint8_round_trip_is_exact():
    every_value = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every_value)), every_value)


def test_image_tensors_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"images: expected uint8 \[N, C, H, W\], got torch.float32"):
        ImageTensors(torch.zeros(2, 1, 4, 4), torch.zeros(2))
    with pytest.raises(ValueError, match=r"labels: expected shape \[2\].*got \[3\]"):
        ImageTensors(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3))


@pytest.mark.parametrize("wrap", [lambda data: data, Items, lambda data: DataLoader(Items(data), batch_size=8)])
def test_batches_shuffle_by_seed_and_read_everything(wrap):
    data = images()
    batches = Batches(wrap(data), device="cpu", batch_size=8)
    first, again, other = (torch.cat([y for _, y in batches.shuffled(seed)]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.cat([x for x, _ in batches.ordered()]), data.batch(torch.arange(20))[0])


def test_a_last_batch_of_one_is_left_out_of_training_only():
    batches = Batches(images(17), device="cpu", batch_size=8)
    assert [len(y) for _, y in batches.shuffled(0)] == [8, 8]
    assert [len(y) for _, y in batches.ordered()] == [8, 9]
    assert [len(y) for _, y in Batches(images(1), device="cpu").shuffled(0)] == [1]


@pytest.mark.parametrize("wrap", [lambda data: data, Items])
def test_split_is_disjoint_and_complete(wrap):
    data = ImageTensors(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.zeros(20))
    parts = Batches(wrap(data), device="cpu").split(0.3, seed=5)
    seen = [torch.cat([to_uint8(x).flatten() for x, _ in part.ordered()]) for part in parts]
    assert [len(part) for part in parts] == [6, 14]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(20, dtype=torch.uint8))


@pytest.mark.parametrize("wrap", [lambda data: data, Items, lambda data: DataLoader(Items(data), batch_size=8)])
def test_batches_number_their_samples(wrap):
    data = images()
    part = Batches(wrap(data), device="cpu", batch_size=8).split(0.5, seed=1)[1]
    seen = []
    for numbers, (pixels, labels) in part.numbered():
        assert torch.equal(pixels, to_float(data.images[numbers]))
        assert torch.equal(labels, data.labels[numbers])
        seen += numbers.tolist()
    assert seen == sorted(set(seen))
    assert len(seen) == 10
    again = [numbers for numbers, _ in part.split(0.5, seed=2)[0].numbered()]
    assert set(torch.cat(again).tolist()) < set(seen)


def test_batches_explain_unusable_data():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(ValueError, match="clean: expected at least one sample, got an empty data set"):
        Batches(TensorDataset(torch.zeros(0, 1)), device="cpu")
    with pytest.raises(TypeError, match=r"clean: expected a map-style data set .* got Stream"):
        Batches(Stream(), device="cpu")
    with pytest.raises(ValueError, match=r"clean: expected enough samples .* got 1"):
        Batches(images(1), device="cpu").split(0.5, seed=0)


def test_dict_batches_travel():
    rows = [{"pixels": torch.full((2,), i), "label": i} for i in range(4)]
    (batch,) = Batches(rows, device="cpu").ordered()
    assert batch["label"].tolist() == [0, 1, 2, 3]
    assert batch["pixels"].shape == (4, 2)


def test_cache_reads_the_data_once_and_gives_the_same_images():
    data = Items(images())
    passes = CachedPasses(Batches(data, device="cpu", batch_size=8), budget=1 << 20)
    first = torch.cat([x for x, _ in passes])
    assert data.reads == 20
    assert torch.equal(torch.cat([x for x, _ in passes]), first)
    assert data.reads == 20
    assert {kept[0].dtype for _, kept in passes._kept} == {torch.uint8}


def test_cache_streams_what_does_not_fit():
    data = Items(images())
    passes = CachedPasses(Batches(data, device="cpu", batch_size=8), budget=500)  # two of three batches would fit
    for _ in range(2):
        assert sum(len(y) for _, y in passes) == 20
    assert data.reads == 40
    assert passes._kept is None


def test_cache_keeps_images_that_are_no_bytes_as_they_are():
    pixels = torch.randn(6, 1, 2, 2)
    passes = CachedPasses(Batches(TensorDataset(pixels, torch.zeros(6)), device="cpu"), budget=1 << 20)
    for _ in range(2):
        assert torch.equal(torch.cat([x for x, _ in passes]), pixels)


def idx_file(path: Path, content: np.ndarray) -> None:
    header = bytes([0, 0, 8, content.ndim]) + b"".join(size.to_bytes(4, "big") for size in content.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + content.tobytes())


@pytest.fixture
def debian_folder(tmp_path, monkeypatch):
    """A folder like the Debian package's, with four small files, and nothing else to be had."""
    folder = tmp_path / "debian"
    folder.mkdir()
    for part, count in (("train", 12), ("t10k", 5)):
        idx_file(folder / f"{part}-images-idx3-ubyte.gz", np.full((count, 28, 28), count, np.uint8))
        idx_file(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    digests = {}
    for name in fashion_mnist.SHA256:
        with gzip.open(folder / f"{name}.gz") as file:
            digests[name] = fashion_mnist.hashlib.sha256(file.read()).hexdigest()
    monkeypatch.setattr(fashion_mnist, "SHA256", digests)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", folder)

    def unreachable(*args):
        raise OSError("no network")

    monkeypatch.setattr(fashion_mnist, "_download", unreachable)
    monkeypatch.setattr(fashion_mnist, "_debian_package", unreachable)
    return folder


def test_demo_data_comes_from_the_debian_folder_then_from_the_cache(tmp_path, debian_folder):
    cache = tmp_path / "cache"
    source = fashion_mnist.demo_data(cache)
    assert (source.name, len(source.train), len(source.test)) == ("Fashion-MNIST", 12, 5)
    assert "Debian" in source.message or str(debian_folder) in source.message
    assert source.test.class_names[0] == "T-shirt/top"
    shutil.rmtree(debian_folder)
    assert "cache" in fashion_mnist.demo_data(cache).message


def test_a_damaged_cache_is_noticed_and_replaced(tmp_path, debian_folder):
    cache = tmp_path / "cache"
    fashion_mnist.demo_data(cache)
    damaged = cache / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    source = fashion_mnist.demo_data(cache)
    assert str(debian_folder) in source.message
    assert source.train.labels.max() <= 9


def test_digits_are_the_last_resort_and_the_message_says_why(tmp_path, debian_folder):
    shutil.rmtree(debian_folder)
    source = fashion_mnist.demo_data(tmp_path / "cache")
    assert source.name == "digits"
    assert source.train.images.shape == (1500, 1, 8, 8)
    assert source.train.images.max() == 255
    assert "no network" in source.message
    assert "is missing" in source.message


def test_a_truncated_file_leaves_nothing_half_written(tmp_path, debian_folder):
    packed = debian_folder / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-20])
    source = fashion_mnist.demo_data(tmp_path / "cache")
    assert source.name == "digits"
    assert not list((tmp_path / "cache" / "FashionMNIST" / "raw").glob("train-images*"))


def test_image_folder_by_name(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        Image.fromarray(np.full((10, 12, 3), 51, np.uint8)).save(tmp_path / label / "a.png")
    colour = named_data(str(tmp_path), train=True)
    image, label = colour[1]
    assert (image.shape, label) == ((3, 10, 12), 1)
    assert torch.allclose(image, torch.tensor(0.2))
    grey = named_data(str(tmp_path), train=True, channels=1, size=8)
    assert grey[0][0].shape == (1, 8, 8)


def test_named_data_explains_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'CIFAR10'"):
        named_data("cifar10", train=True)
    with pytest.raises(ValueError, match="data: expected the files of CIFAR10 in"):
        named_data("CIFAR10", train=True, root=tmp_path)
    with pytest.raises(ValueError, match="data: expected one sub-folder of images per class"):
        named_data(str(tmp_path), train=True)
