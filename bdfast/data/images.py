"""Image sets held in memory as uint8, four times smaller than the float32 that a network sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset


class ImageTensors(Dataset[tuple[torch.Tensor, int]]):
    """Images [N, C, H, W] uint8 and labels [N] int64.

    As a dataset it yields `(image [C, H, W] float32 in [0, 1], label)`; `batch` does the same for many at once.

    Raises:
        ValueError: The shapes or the dtype do not fit; the message says which.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str] | None = None) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images: expected uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}; "
                "scale to 0..255 and add the missing dimensions."
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels: expected shape [{len(images)}] like images, got {list(labels.shape)}; "
                "give one label per image."
            )
        self.images = images
        self.labels = labels.long()
        self.class_names = tuple(class_names) if class_names is not None else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return to_float(self.images[index]), int(self.labels[index])

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [B, C, H, W] float32 in [0, 1] and labels [B], on the device of the set."""
        return to_float(self.images[indices]), self.labels[indices]

    def subset(self, indices: torch.Tensor) -> ImageTensors:
        """The images at `indices`, in that order, as a set of their own."""
        return ImageTensors(self.images[indices], self.labels[indices], self.class_names)

    def to(self, device: torch.device | str) -> ImageTensors:
        """The same set on `device`."""
        return ImageTensors(self.images.to(device), self.labels.to(device), self.class_names)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 0..1, with the same division as torchvision's ToTensor."""
    return images.to(torch.float32).div_(255)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float 0..1 -> uint8 0..255, rounded and clipped."""
    return images.mul(255).round_().clamp_(0, 255).to(torch.uint8)
