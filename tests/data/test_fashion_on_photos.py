"""The colour set: garments cut out and laid on photographs, on small stand-ins; the real file where it is there."""

import hashlib
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bdfast.data import ImageTensors, fashion_on_photos, garments, photos
from bdfast.data.data_source import DataSource, SourceUnavailable, channel_statistics, default_cache

STAND_IN = "c4453b75"
"""Start of the SHA256 of what is built from the stand-ins."""


def noise(seed: int, *shape: int) -> np.ndarray:
    """Bytes that every NumPy draws alike."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return (raw >> np.uint64(56)).astype(np.uint8).reshape(shape)


def some_garments(count: int, seed: int) -> ImageTensors:
    """Squares of some grey on black, each in a place of its own."""
    grey = np.zeros((count, 1, 28, 28), np.uint8)
    places = noise(seed, count, 2) % 11 + 1
    for image, (top, left), values in zip(grey, places, noise(seed + 1000, count, 14, 14), strict=True):
        image[0, top : top + 14, left : left + 14] = 100 + values // 2
    return ImageTensors(torch.from_numpy(grey), torch.arange(count) % 10, fashion_on_photos.CLASSES)


def some_photo(seed: int, size: tuple[int, int] = (140, 200)) -> np.ndarray:
    return noise(seed, *size, 3)


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A package with four small photographs, a few garments, and nothing else to be had."""
    folder = tmp_path / "backgrounds"
    folder.mkdir()
    digests = {}
    for number in range(4):
        file = io.BytesIO()
        Image.fromarray(some_photo(number)).save(file, "png")
        (folder / f"{number}.png").write_bytes(file.getvalue())
        digests[f"{number}.png"] = hashlib.sha256(file.getvalue()).hexdigest()
    train, test = dict(list(digests.items())[:3]), dict(list(digests.items())[3:])
    monkeypatch.setattr(photos, "PACKAGES", {"some-photos": photos.Package(folder, train, test)})

    def no_package(name):
        raise SourceUnavailable("no network")

    monkeypatch.setattr(photos, "unpacked_package", no_package)
    source = DataSource("garments", some_garments(40, 1), some_garments(20, 2), "made up")
    monkeypatch.setattr(fashion_on_photos, "fashion_mnist_source", lambda cache: source)
    monkeypatch.setattr(fashion_on_photos, "COUNTS", {"train": 40, "test": 20})
    built = fashion_on_photos.build(source.train, source.test, *photos.photos())
    monkeypatch.setattr(fashion_on_photos, "SHA256", fashion_on_photos.digest(built))
    return folder


def test_it_is_built_once_and_then_read(tmp_path, stand_ins):
    cache = tmp_path / "cache"
    first = fashion_on_photos.fashion_on_photos_source(cache)
    assert "built" in first.message
    assert [path.name for path in cache.iterdir()] == [fashion_on_photos.FILE]
    for path in stand_ins.iterdir():
        path.unlink()
    again = fashion_on_photos.fashion_on_photos_source(cache)
    assert str(cache) in again.message
    for part, count in (("train", 40), ("test", 20)):
        images, same = getattr(first, part), getattr(again, part)
        assert images.images.shape == (count, 3, 32, 32)
        assert images.images.dtype == torch.uint8
        assert images.labels.tolist() == [number % 10 for number in range(count)]
        assert torch.equal(images.images, same.images)
        assert torch.equal(images.labels, same.labels)
    assert first.train.class_names == fashion_on_photos.CLASSES


def change_a_value(path):
    tensors = load_file(path)
    tensors["test_labels"][0] += 1
    save_file(tensors, path)


def change_a_name(path):
    tensors = load_file(path)
    tensors["test_classes"] = tensors.pop("test_labels")
    save_file(tensors, path)


@pytest.mark.parametrize(
    "damage",
    [
        change_a_value,
        change_a_name,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
        lambda path: os.truncate(path, 10**9),
    ],
)
def test_a_damaged_file_is_built_again(tmp_path, stand_ins, damage):
    good = fashion_on_photos.fashion_on_photos_source(tmp_path).test
    damage(tmp_path / fashion_on_photos.FILE)
    mended = fashion_on_photos.fashion_on_photos_source(tmp_path)
    assert "built" in mended.message
    assert torch.equal(mended.test.labels, good.labels)
    assert "cache" in fashion_on_photos.fashion_on_photos_source(tmp_path).message


def test_other_photographs_are_refused_and_what_was_tried_is_said(tmp_path, stand_ins):
    Image.fromarray(some_photo(9)).save(stand_ins / "2.png")
    with pytest.raises(SourceUnavailable) as raised:
        fashion_on_photos.fashion_on_photos_source(tmp_path)
    for part in (
        f"the folder {stand_ins}: 2.png is another picture",
        "the Debian package some-photos: no network",
        f"{tmp_path / fashion_on_photos.FILE} is missing",
        "Install the Debian packages",
    ):
        assert part in str(raised.value)
    (stand_ins / "2.png").unlink()
    with pytest.raises(SourceUnavailable, match=r"2\.png is missing"):
        fashion_on_photos.fashion_on_photos_source(tmp_path)


def test_without_fashion_mnist_it_says_so(tmp_path, stand_ins, monkeypatch):
    def missing(cache):
        raise SourceUnavailable("Fashion-MNIST could not be obtained: no network")

    monkeypatch.setattr(fashion_on_photos, "fashion_mnist_source", missing)
    with pytest.raises(SourceUnavailable, match="Fashion-MNIST could not be obtained: no network"):
        fashion_on_photos.fashion_on_photos_source(tmp_path)


def test_images_that_came_out_differently_are_not_kept(tmp_path, stand_ins, monkeypatch):
    monkeypatch.setattr(fashion_on_photos, "SHA256", "0" * 64)
    with pytest.raises(SourceUnavailable, match="expected to build images with the SHA256 0000"):
        fashion_on_photos.fashion_on_photos_source(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_photographs_come_from_the_package_where_they_are_not_installed(stand_ins, tmp_path, monkeypatch):
    elsewhere = tmp_path / "files" / stand_ins.relative_to("/")
    elsewhere.parent.mkdir(parents=True)
    stand_ins.rename(elsewhere)
    monkeypatch.setattr(photos, "unpacked_package", lambda name: photos.nullcontext(tmp_path / "files"))
    train, test = photos.photos()
    assert (len(train), len(test)) == (3, 1)
    assert np.array_equal(test[0], some_photo(3))


def test_the_same_bytes_everywhere():
    """In whole numbers, so this digest holds on every machine and with every NumPy."""
    pictures = garments.lay_on_photos(some_garments(30, 3).images[:, 0].numpy(), [some_photo(0), some_photo(1)], seed=7)
    assert hashlib.sha256(pictures).hexdigest().startswith(STAND_IN)


def test_the_result_depends_on_seed_and_order_only(monkeypatch):
    grey, behind = some_garments(30, 3).images[:, 0].numpy(), [some_photo(0), some_photo(1)]
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = garments.lay_on_photos(grey, behind, seed=7)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert not np.array_equal(first, garments.lay_on_photos(grey, behind, seed=8))
    monkeypatch.setattr(garments, "CHUNK", 7)
    assert np.array_equal(first, garments.lay_on_photos(grey, behind, seed=7))


def test_outside_the_garment_is_a_crop_of_a_photo():
    """Of a photo whose pixels are their own place: the crop is an even grid, mirrored or not."""
    size = 256
    photo = np.zeros((size, size, 3), np.uint8)
    photo[..., 0], photo[..., 1] = np.arange(size)[:, None], np.arange(size)
    pictures = garments.lay_on_photos(np.zeros((50, 28, 28), np.uint8), [photo], seed=0).astype(int)
    down, right = np.diff(pictures[:, 0], axis=1), np.diff(pictures[:, 1], axis=2)
    for steps in (down, right):
        scale = np.abs(steps[:, :1, :1])
        assert (np.abs(steps) == scale).all()
        assert scale.min() == garments.FEWEST_PIXELS
        assert scale.max() == size // 32
    assert (down > 0).all()
    assert 10 < (right[:, 0, 0] < 0).sum() < 40


def test_a_garment_covers_and_stands_out():
    grey = np.zeros((200, 28, 28), np.uint8)
    grey[:, 4:24, 4:24] = 200
    for value in (0, 60, 127, 128, 200, 255):
        pictures = garments.lay_on_photos(grey, [np.full((128, 128, 3), value, np.uint8)], seed=3).astype(int)
        inside = pictures[:, :, 13:19, 13:19]  # covered wherever the garment lies
        assert (inside.max((2, 3)) == inside.min((2, 3))).all()
        brightness = (77 * inside[:, 0, 0, 0] + 150 * inside[:, 1, 0, 0] + 29 * inside[:, 2, 0, 0]) // 256
        assert np.abs(brightness - value).min() >= garments.LEAST_CONTRAST - 3
        assert (pictures == value).all(1).sum() >= 200 * (32 * 32 - 20 * 20)


def test_holes_are_cut_out_and_dark_prints_are_not():
    grey = np.zeros((1, 28, 28), np.uint8)
    grey[0, 4:24, 4:24] = 200
    grey[0, 8:12, 8:12] = 0
    grey[0, 18:20, 8:20] = 3
    shades, cover = garments.cut_out(grey)
    assert (cover[0, 8:12, 8:12] == 0).all()
    assert (cover[0, 18:20, 8:20] == 8).all()
    assert (shades[0, 18:20, 8:20] < -100).all()
    assert (cover[0, :4] == 0).all()
    assert 0 < cover[0, 4, 10] < 8
    assert (shades[cover == 0] == 0).all()


def test_photographs_are_scaled_down_by_rounded_means():
    pixels = some_photo(5, (2 * 768 + 1, 2 * 768 + 9))
    means = pixels[:1536, : 768 * 2 + 8].reshape(768, 2, 772, 2, 3).sum((1, 3), dtype=int)
    assert np.array_equal(photos.scaled_down(pixels), (means + 2) // 4)
    small = some_photo(5, (200, 900))
    assert photos.scaled_down(small) is not None
    assert np.array_equal(photos.scaled_down(small), small)


@pytest.mark.parametrize(
    ("grey", "behind", "message"),
    [
        (
            np.zeros((1, 28, 27), np.uint8),
            [some_photo(0)],
            r"grey: expected uint8 \[N, 28, 28\], got uint8 \[1, 28, 27\]",
        ),
        (np.zeros((1, 28, 28)), [some_photo(0)], r"grey: expected uint8 .* got float64"),
        (np.zeros((1, 28, 28), np.uint8), [], "photos: expected some"),
        (np.zeros((1, 28, 28), np.uint8), [some_photo(0, (127, 300))], "photos: expected some, all of at least 128"),
    ],
)
def test_what_cannot_be_laid_is_named(grey, behind, message):
    with pytest.raises(ValueError, match=message):
        garments.lay_on_photos(grey, behind, seed=0)


def test_no_photograph_serves_both_parts():
    parts = [(package.train, package.test) for package in photos.PACKAGES.values()]
    train = {sha256 for part in parts for sha256 in part[0].values()}
    test = {sha256 for part in parts for sha256 in part[1].values()}
    assert (len(train), len(test)) == (17, 7)
    assert not train & test


def test_the_built_file():
    """All of the real set, where an earlier call has built it; nothing is built or fetched here."""
    cache = default_cache()
    if not (cache / fashion_on_photos.FILE).is_file():
        pytest.skip(f"{fashion_on_photos.FILE} is not in the data cache")
    source = fashion_on_photos.fashion_on_photos_source(cache)
    assert "cache" in source.message
    for part, count in ((source.train, 60_000), (source.test, 10_000)):
        assert part.images.shape == (count, 3, 32, 32)
        assert part.labels.bincount().tolist() == [count // 10] * 10
    assert (source.mean, source.std) == channel_statistics(source.train.images)
