"""Models and data as the command line names them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn
from torch.utils.data import Dataset, Subset

from bdfast.data.named_sets import named_data
from bdfast.io.checkpoints import load_into, read_description
from bdfast.models.spec import ModelSpec


@dataclass(frozen=True)
class ModelInput:
    """A trained network on disk.

    Attributes:
        weights: Checkpoint: safetensors, or saved by torch with the weights under any key.
        spec: How to build the network. A checkpoint that bdfast wrote carries it; then these options are not used.
    """

    weights: tyro.conf.Positional[Path]
    spec: Annotated[ModelSpec, tyro.conf.arg(name="")] = field(default_factory=ModelSpec)

    def load(self) -> tuple[nn.Module, ModelSpec]:
        """The network with its weights, on the GPU if there is one."""
        described = read_description(self.weights)
        spec = self.spec
        if described:
            spec = ModelSpec.from_json(described)
            _check_size(spec, self.weights)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_into(spec.build(), self.weights).to(device), spec


def _check_size(spec: ModelSpec, weights: Path) -> None:
    """Refuse a description of a network that is larger than its file, before any memory is taken for it."""
    with torch.device("meta"):
        values = sum(x.numel() for x in spec.build().state_dict().values())
    if values > weights.stat().st_size:
        raise ValueError(
            f"weights: expected the weights of the network that {weights} describes, got {weights.stat().st_size:,} "
            f"bytes for {values:,} values; get the whole file, or one that you trust."
        )


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are read.

    Attributes:
        root: Where torchvision's files lie; the data cache when left out.
        size: Scale and crop the images to this many pixels a side.
    """

    root: Path | None = None
    size: int | None = None

    def named(self, name: str, *, train: bool, spec: ModelSpec) -> Dataset[Any]:
        """The data set of that name, with as many channels as the network takes."""
        return named_data(
            name,
            train=train,
            root=self.root,
            channels=spec.in_channels,
            size=self.size,
            classes=spec.num_classes,
            class_names=spec.class_names,
        )


@dataclass(frozen=True, kw_only=True)
class DataInput(ImageOptions):
    """Images by name.

    Attributes:
        data: A folder with one sub-folder per class, the name of a set of torchvision, or fashion-mnist, digits,
            mnist-digits or fashion-on-photos.
    """

    data: str

    def load(self, *, train: bool, spec: ModelSpec) -> Dataset[Any]:
        """The data set."""
        return self.named(self.data, train=train, spec=spec)


def drawn(data: Dataset[Any], images: int | None, seed: int) -> Dataset[Any]:
    """So many images of a data set, drawn by the seed; all for None.

    Raises:
        ValueError: None are asked for.
    """
    if images is None:
        return data
    if images < 1:
        raise ValueError(f"images: expected at least 1, got {images}; leave it out for all.")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return Subset(data, order[:images].tolist())


@dataclass(frozen=True, kw_only=True)
class CleanInput(ImageOptions):
    """The defender's images by name, if there are any.

    Attributes:
        data: A folder with one sub-folder per class, the name of a set of torchvision, or fashion-mnist, digits,
            mnist-digits or fashion-on-photos. Needed by all methods but clp and otbr.
    """

    data: str | None = None

    def load(self, *, spec: ModelSpec) -> Dataset[Any] | None:
        """The data set, its training part."""
        return None if self.data is None else self.named(self.data, train=True, spec=spec)
