"""Data by name: a source of `sources.py`, a folder of images, or any classification set of torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2

from bdfast.data.data_source import default_cache
from bdfast.data.image_folder import ClassFolders
from bdfast.data.sources import SOURCES, load_source
from bdfast.errors import nearest


def named_data(
    name: str,
    *,
    train: bool,
    root: Path | None = None,
    channels: int = 3,
    size: int | None = None,
    classes: int | None = None,
    class_names: Sequence[str] = (),
) -> Dataset[Any]:
    """A map-style data set of (image [channels, H, W] float32 in [0, 1], label).

    Args:
        name: A named source ("fashion-mnist", "fashion-on-photos", ...), whose images are fetched if need be and have
            their own channels and size; a folder with one sub-folder of images per class; or the name of a
            classification set of torchvision ("CIFAR10", "GTSRB", ...).
        train: The training or the test part; a folder has only one.
        root: Where torchvision's files lie; nothing is downloaded. The data cache when left out.
        channels: 1 turns images to grey, 3 grey ones to colour.
        size: Scale and crop images to this many pixels a side; needed where they differ in size.
        classes: How many outputs the model has; a folder must have as many sub-folders.
        class_names: Names of the outputs in their order, where the checkpoint stores them; the sub-folders of a folder
            are matched with these.

    Raises:
        ValueError: There is no such folder or set, its files are missing, its classes are not those of the model, or
            the name is that of a source and of a folder.
        SourceUnavailable: The images of a named source cannot be had.
    """
    if name in SOURCES and root is None:
        if Path(name).is_dir():
            raise ValueError(
                f"data: expected a name with one meaning, got {name!r}, which is a named source and a folder here; "
                f"write './{name}' for the folder, or go elsewhere for the source."
            )
        source = load_source(name)
        return source.train if train else source.test
    steps: list[Any] = [v2.ToImage(), v2.Grayscale(channels)] if channels == 1 else [v2.ToImage(), v2.RGB()]
    if size is not None:
        steps += [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])
    if Path(name).is_dir():
        return ClassFolders(Path(name), transform, classes=classes, class_names=class_names)
    known = [known for known in datasets.__all__ if _splits(known)]
    if name not in known:
        raise ValueError(
            f"data: expected a folder, one of {', '.join(SOURCES)}, or a classification set of torchvision, got "
            f"{name!r}; {nearest(name, [*SOURCES, *known])}"
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
