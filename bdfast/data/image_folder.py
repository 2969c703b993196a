"""A folder with one sub-folder of images per class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

SIXTEEN_BITS = 65535.0


class ClassFolders(Dataset[tuple[torch.Tensor, int]]):
    """Images of a folder, with the number of their sub-folder's class.

    Where the model's classes have names, a sub-folder is matched by its name. Where they have not, the number of
    sub-folders must equal that of the outputs; names that are all digits are the class numbers themselves, others count
    in alphabetical order. Hidden folders and files are skipped. Sixteen-bit images keep their values.

    Args:
        root: The folder.
        transform: From an image (PIL, or a tensor [1, H, W] float32 in [0, 1] for sixteen-bit ones) to a tensor.
        classes: Number of outputs of the model; not compared when left out.
        class_names: Names of the outputs, in their order.

    Raises:
        ValueError: The sub-folders are not the classes of the model, or one is empty; the message names it. On reading,
            a file cannot be read or has another size than the others.
    """

    def __init__(
        self,
        root: Path,
        transform: Callable[[Any], torch.Tensor],
        *,
        classes: int | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        self.root, self.transform = root, transform
        folders = {path.name: path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
        if not folders:
            raise ValueError(
                f"data: expected one sub-folder of images per class in {root}, got none; sort the images into folders."
            )
        numbers = _class_numbers(root, list(folders), classes, class_names)
        self.samples: list[tuple[Path, int]] = []
        for name, number in sorted(numbers.items(), key=lambda item: item[1]):
            files = [path for path in sorted(folders[name].rglob("*")) if _shown(path, root)]
            found = [path for path in files if path.suffix.lower() in IMG_EXTENSIONS]
            if not found:
                raise ValueError(
                    f"data: expected images of class {name!r} in {folders[name]}, got none with a suffix of "
                    f"{', '.join(IMG_EXTENSIONS)}; add some, or remove the folder."
                )
            self.samples += [(path, number) for path in found]
        self._shape: tuple[torch.Size, Path] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        image = self.transform(read_image(path))
        shape, first = self._shape = self._shape or (image.shape, path)
        if image.shape != shape:
            raise ValueError(
                f"data: expected images of one size, got {list(image.shape[1:])} in {path} and {list(shape[1:])} in "
                f"{first}; pass --size, which scales and crops them."
            )
        return image, label


def read_image(path: Path) -> Any:
    """An image as PIL's RGB, or L where it is grey.

    One with sixteen bits, which RGB would clip, comes as a tensor [1, H, W] float32 in [0, 1].

    Raises:
        ValueError: The file cannot be read; the message names it.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                values = torch.from_numpy(np.array(image).astype(np.float32)).unsqueeze(0)
                return values / SIXTEEN_BITS if image.mode.startswith("I") else values
            # From RGB back to grey would lose up to one of 255 values.
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"data: expected an image in {path}, got a file that cannot be read ({error}); mend or remove it."
        ) from error


def _class_numbers(root: Path, folders: list[str], classes: int | None, names: Sequence[str]) -> dict[str, int]:
    """The class number of every sub-folder."""
    if names:
        unknown = sorted(set(folders) - set(names))
        missing = sorted(set(names) - set(folders))
        if unknown or missing:
            raise ValueError(
                f"data: expected a sub-folder for each class of the checkpoint in {root}, got "
                f"{len(missing)} missing{_first(missing)} and {len(unknown)} unknown{_first(unknown)}; name the "
                "folders like the classes."
            )
        return {name: list(names).index(name) for name in folders}
    if classes is not None and len(folders) != classes:
        raise ValueError(
            f"data: expected {classes} sub-folders in {root}, one for each output of the model, got {len(folders)}; "
            "add the missing ones, or choose the right model (--num-classes)."
        )
    if all(name.isdecimal() for name in folders):
        numbers = {name: int(name) for name in folders}
        absent = sorted(set(range(len(folders))) - set(numbers.values()))
        if absent:
            raise ValueError(
                f"data: expected the class numbers 0..{len(folders) - 1} as the names of the sub-folders of {root}, "
                f"got none for {absent[0]}; rename the folders to the numbers of the model's outputs."
            )
        return numbers
    return {name: number for number, name in enumerate(sorted(folders))}


def _shown(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def _first(names: list[str]) -> str:
    return f" ({names[0]!r})" if names else ""
