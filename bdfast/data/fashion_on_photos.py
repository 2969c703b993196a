"""Colour images: garments of Fashion-MNIST, coloured, on crops of photographs. Built once, then in the data cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bdfast.data.data_source import DataSource, SourceUnavailable, default_cache
from bdfast.data.fashion_mnist import fashion_mnist_source
from bdfast.data.garments import SIDE, lay_on_photos
from bdfast.data.images import ImageTensors
from bdfast.data.photos import Pixels, photos
from bdfast.files import whole_file

NAME = "fashion-on-photos"
FILE = f"{NAME}.safetensors"
TRAIN_SEED, TEST_SEED = 1, 2
SHA256 = "392caac3bbfbf16acebfd703584f12a757ede1ecbb9d743f6272711859262f28"
"""Of the tensors in the file, as `digest` computes it."""
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
COUNTS = {"train": 60_000, "test": 10_000}
HEADER_BYTES = 4096
"""More than the header of our file has."""


def fashion_on_photos_source(cache: Path | None = None) -> DataSource:
    """70,000 colour images [3, 32, 32] in the 10 classes of Fashion-MNIST, 60,000 of them to train.

    Each is one garment of Fashion-MNIST, cut out, given a random colour and laid on a random crop of a photograph. The
    crops behind test images are from 7 other photographs than the 17 behind training images. The garments are those of
    Fashion-MNIST's own training and test set.

    The first call fetches Fashion-MNIST and the Debian packages lomiri-wallpapers-16.04 and mate-backgrounds, which
    carry the photographs, and builds the images: the same bytes everywhere. Later calls read them from the data cache.

    Fashion-MNIST: Xiao et al., arXiv:1708.07747, MIT licence. Photographs: CC BY 4.0, CC BY-SA 4.0, CC0 and GPL 2 or
    later; docs/data.md names the authors.

    Args:
        cache: Folder that keeps the file of 215 MB; `default_cache()` when left out.

    Raises:
        SourceUnavailable: Fashion-MNIST or the photographs cannot be had, or the images came out differently.
    """
    cache = default_cache() if cache is None else cache
    path = cache / FILE
    try:
        tensors = _read(path)
        message = f"{NAME} from the data cache {cache}"
    except SourceUnavailable as error:
        tensors = _obtain(cache, path, str(error))
        message = f"{NAME}, built from Fashion-MNIST and photographs of Debian packages"
    train, test = (
        ImageTensors(tensors[f"{part}_images"], tensors[f"{part}_labels"], CLASSES) for part in ("train", "test")
    )
    mean, std = (0.5449, 0.5195, 0.4217), (0.2675, 0.2695, 0.3205)
    return DataSource(NAME, train, test, message, epochs=4, mean=mean, std=std)


def build(
    train: ImageTensors, test: ImageTensors, train_photos: list[Pixels], test_photos: list[Pixels]
) -> dict[str, torch.Tensor]:
    """Images and labels of both parts, as they stand in the file.

    Args:
        train: Garments [N, 1, 28, 28] to lay on `train_photos`.
        test: The same for `test_photos`.
        train_photos: Each [H, W, 3] uint8.
        test_photos: Others.
    """
    tensors = {}
    for part, garments, pictures, seed in (
        ("train", train, train_photos, TRAIN_SEED),
        ("test", test, test_photos, TEST_SEED),
    ):
        laid = lay_on_photos(garments.images[:, 0].numpy(), pictures, seed)
        tensors[f"{part}_images"] = torch.from_numpy(laid)
        tensors[f"{part}_labels"] = garments.labels.to(torch.uint8)
    return tensors


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA256 of the values of all tensors in the order of their names."""
    total = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()


def _obtain(cache: Path, path: Path, reason: str) -> dict[str, torch.Tensor]:
    try:
        garments = fashion_mnist_source(cache)
        tensors = build(garments.train, garments.test, *photos())
    except SourceUnavailable as error:
        raise SourceUnavailable(
            f"{NAME}: expected Fashion-MNIST and the photographs to build it from, got: {error}; and {path} {reason}. "
            f"Install the Debian packages, or put {FILE} of another machine into the data cache."
        ) from error
    if (came := digest(tensors)) != SHA256:
        raise SourceUnavailable(
            f"{NAME}: expected to build images with the SHA256 {SHA256}, got {came}; the JPEG decoder of this machine "
            f"may differ, so put {FILE} of another machine into {cache}."
        )
    cache.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        save_file(tensors, temporary)
    return tensors


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise SourceUnavailable("is missing")
    # Before anything is taken into memory.
    expected = sum(COUNTS.values()) * (3 * SIDE * SIDE + 1)
    if not expected < path.stat().st_size < expected + HEADER_BYTES:
        raise SourceUnavailable("is damaged")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SourceUnavailable("is damaged") from error
    shapes = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    wanted = {}
    for part, count in COUNTS.items():
        wanted[f"{part}_images"] = (torch.uint8, [count, 3, SIDE, SIDE])
        wanted[f"{part}_labels"] = (torch.uint8, [count])
    if shapes != wanted or digest(tensors) != SHA256:
        raise SourceUnavailable("is damaged")
    return tensors
