"""A user's own data by name: a folder of images, or any classification set of torchvision."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2

from bdfast.data.sources import default_cache, demo_data
from bdfast.errors import nearest

DEMO = "fashion-mnist"


def named_data(
    name: str, *, train: bool, root: Path | None = None, channels: int = 3, size: int | None = None
) -> Dataset[Any]:
    """A map-style data set of (image [channels, H, W] float32 in [0, 1], label).

    Args:
        name: A folder with one sub-folder of images per class, the name of a classification set of torchvision
            ("CIFAR10", "GTSRB", ...), or "fashion-mnist", which is fetched if need be.
        train: The training or the test part of a torchvision set; a folder has only one.
        root: Where torchvision's files lie; nothing is downloaded. The data cache when left out.
        channels: 1 turns images to grey, 3 grey ones to colour.
        size: Scale and crop images to this many pixels a side; needed where they differ in size.

    Raises:
        ValueError: There is no such folder or set, or its files are missing.
    """
    if name == DEMO and root is None:
        source = demo_data()
        return source.train if train else source.test
    steps: list[Any] = [v2.ToImage(), v2.Grayscale(channels)] if channels == 1 else [v2.ToImage(), v2.RGB()]
    if size is not None:
        steps += [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])
    if Path(name).is_dir():
        try:
            return datasets.ImageFolder(name, transform=transform)
        except FileNotFoundError as error:
            raise ValueError(
                f"data: expected one sub-folder of images per class in {name}, got something else ({error}); "
                "sort the images into folders."
            ) from error
    known = [known for known in datasets.__all__ if _splits(known)]
    if name not in known:
        raise ValueError(
            f"data: expected a folder, {DEMO} or a classification set of torchvision, got {name!r}; "
            f"{nearest(name, [DEMO, *known])}"
        )
    split = _splits(name)["train" if train else "test"]
    folder = default_cache() if root is None else root
    try:
        return getattr(datasets, name)(folder, transform=transform, **split)
    except (RuntimeError, FileNotFoundError) as error:
        raise ValueError(
            f"data: expected the files of {name} in {folder}, got: {error}; download them there, or pass --root."
        ) from error


def _splits(name: str) -> dict[str, dict[str, Any]]:
    """The arguments that name the two parts of a torchvision set; empty where it has no such parts."""
    parameters = inspect.signature(getattr(datasets, name)).parameters
    if "transform" not in parameters or "root" not in parameters:
        return {}
    if "train" in parameters:
        return {"train": {"train": True}, "test": {"train": False}}
    if "split" in parameters:
        return {"train": {"split": "train"}, "test": {"split": "test"}}
    return {}
