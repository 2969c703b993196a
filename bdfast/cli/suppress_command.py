"""`bdfast suppress METHOD`: train a network on data that may be poisoned."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.markup import escape
from rich.table import Table
from torch.utils.data import Dataset

from bdfast.cli.inputs import DataInput
from bdfast.cli.method_arguments import Flat, parsed
from bdfast.cli.terminal import Output
from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batches
from bdfast.data.image_folder import ClassFolders
from bdfast.data.images import ImageTensors
from bdfast.data.named_sets import named_data
from bdfast.files import finite, whole_file, writable_folder
from bdfast.models.preact_resnet import Stem
from bdfast.models.spec import ModelSpec
from bdfast.scenario import untrained
from bdfast.suppression import METHODS, Suppression
from bdfast.suppression.suppressing import suppress

COLORS = 3
"""Channels of folders and torchvision sets, unless they are asked for in grey."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The network to train; what is left out comes from the data.

    Attributes:
        arch: preact_resnet18, small_vgg11, small_vgg11_bn, small_vgg16, small_vgg16_bn, small_mobilenet_v2, small_vit,
            small_convnext, or a name of `register_model`; the name of a classifier of torchvision (resnet18, vit_b_16,
            ...); or "timm/" and the name of a network of timm, which has to be installed.
        num_classes: Number of outputs; as many as there are classes in the data, when left out.
        in_channels: Channels of the image; those of the data when left out, and 3 for folders and torchvision sets,
            which 1 turns to grey.
        width: Channels of the first layers, for bdfast's own networks; the published number when left out.
        stem: First layer of preact_resnet18: cifar, stride2 or imagenet.
        mean: Mean per channel that the network subtracts; that of the data when left out.
        std: Standard deviation per channel that it divides by; that of the data when left out.
        class_names: Names of the outputs, in their order; those of the data, if it has some, when left out.
        depth: Number of blocks of small_vit, or of the first stage of small_convnext; the published number when left
            out.
        image_size: Height and width of the image in pixels, which small_vit is built for; the height of those in the
            data when left out.
    """

    arch: str = "preact_resnet18"
    num_classes: int | None = None
    in_channels: int | None = None
    width: int | None = None
    stem: Stem = "cifar"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()
    depth: int | None = None
    image_size: int | None = None

    def for_data(self, data: Dataset[Any], batch_size: int) -> ModelSpec:
        """The network for these images, which are read once where their mean, std or classes are not known.

        Raises:
            ValueError: There is no such network, or it is not for these images.
        """
        channels, height = data[0][0].shape[:2]
        if self.in_channels not in (None, channels):
            raise ValueError(
                f"in_channels: expected {channels}, the channels of the images, got {self.in_channels}; leave it out."
            )
        if bool(self.mean) != bool(self.std):
            raise ValueError(
                f"std: expected mean and std, or neither, got {list(self.mean)} and {list(self.std)}; give both."
            )
        names = self.class_names or class_names(data)
        classes = self.num_classes or len(names)
        spec = ModelSpec(
            arch=self.arch,
            num_classes=classes or 1,
            in_channels=channels,
            width=self.width,
            stem=self.stem,
            mean=self.mean or (0.0,) * channels,
            std=self.std or (1.0,) * channels,
            depth=self.depth,
            image_size=self.image_size or height,
        )
        with torch.device("meta"):
            spec.build()  # a wrong name or option, before all images are read
        if not (classes and self.mean):
            counted, mean, std = statistics(data, channels, batch_size)
            classes = classes or counted
            spec = replace(spec, num_classes=classes, mean=self.mean or mean, std=self.std or std)
        if len(names) == classes:
            return replace(spec, class_names=tuple(names))
        if self.class_names:
            raise ValueError(
                f"class_names: expected a name for each of the {classes} classes, got {len(names)}; give all."
            )
        return spec


@dataclass(frozen=True)
class Suppress:
    """Train a network on data that may be poisoned, so that it learns the task and not the backdoor.

    Attributes:
        suspicious: The training data; the training part, of a torchvision set.
        network: What is trained, from fresh weights.
        output: Folder for model.safetensors, suspected.csv and result.json.
        workdir: Where checkpoints go, so that a run that was killed can go on.
        seed: Of all randomness.
        batch_size: Images in one step.
        augment: Shift images at random by up to a 28th of their size.
        flip: Mirror every second image as well.
        amp: Compute in bfloat16 where the device has instructions for it.
        show: How to report.
    """

    suspicious: Annotated[DataInput, Flat]
    network: Annotated[NetworkOptions, Flat] = field(default_factory=NetworkOptions)
    output: Path = Path("suppressed")
    workdir: Path | None = None
    seed: int = 0
    batch_size: int = 128
    augment: bool = True
    flip: bool = False
    amp: bool = True
    show: Annotated[Output, Flat] = field(default_factory=Output)


def main(arguments: list[str]) -> None:
    """Run `bdfast suppress METHOD`."""
    found = parsed("suppress", "--data DATA", Suppress, METHODS, arguments)
    if found is not None:
        _suppress(*found)


def _suppress(command: Suppress, method: Suppression) -> None:
    writable_folder(command.output)
    given, network = command.suspicious, command.network
    data = named_data(
        given.data,
        train=True,
        root=given.root,
        channels=network.in_channels or COLORS,
        size=given.size,
        classes=network.num_classes,
        class_names=network.class_names,
    )
    spec = network.for_data(data, command.batch_size)
    result = suppress(
        untrained(spec, seed=command.seed),
        data,
        method=method,
        workdir=command.workdir,
        progress=command.show.progress(),
        inplace=True,
        seed=command.seed,
        batch_size=command.batch_size,
        augment=Augmentation(flip=command.flip) if command.augment else None,
        amp=command.amp,
    )
    result.save(command.output, description=spec.to_json())
    suspected = command.output / "suspected.csv"
    write_suspected(suspected, data, result.suspected.tolist())
    summary = {
        "method": result.method,
        "samples": len(data),  # type: ignore[arg-type]
        "suspected": len(result.suspected),
        "updates": result.updates,
        "seconds": round(result.seconds, 1),
        "model": str(command.output / "model.safetensors"),
        "suspected samples": str(suspected),
        "result": str(command.output / "result.json"),
        "found": result.found,
        "warnings": result.warnings,
        "options": result.options,
    }
    table = Table(show_header=False)
    for key, value in summary.items():
        if key not in ("found", "warnings", "options"):
            table.add_row(key, escape(str(value)))
    for name, found in result.found.items():
        table.add_row(name.replace("_", " "), escape(str(found)))
    for warning in result.warnings:
        table.add_row("warning", escape(warning))
    command.show.result(finite(summary), table)


def class_names(data: Dataset[Any]) -> tuple[str, ...]:
    """The names of the classes in their order, where the data has some: those of the sub-folders of a folder."""
    if isinstance(data, ClassFolders):
        names = {label: path.relative_to(data.root).parts[0] for path, label in data.samples}
        return tuple(names[label] for label in sorted(names))
    return (data.class_names or ()) if isinstance(data, ImageTensors) else ()


def statistics(data: Dataset[Any], channels: int, batch_size: int) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Of images [channels, H, W] with labels: one more than the greatest label, and mean and standard deviation of
    each channel to four digits; of a channel whose values are all the same, the latter is 1."""
    count, most = 0, 0
    total, squares = torch.zeros(2, channels, dtype=torch.float64)
    for images, labels in Batches(data, device="cpu", batch_size=batch_size, name="data").ordered():
        values = images.double().transpose(0, 1).flatten(1)
        count, most = count + values.shape[1], max(most, int(labels.max()))
        total += values.sum(1)
        squares += values.square().sum(1)
    mean = total / count
    deviations = ((squares - count * mean.square()).clamp(min=0) / max(1, count - 1)).sqrt()
    std = [round(value, 4) or 1.0 for value in deviations.tolist()]
    return most + 1, tuple(round(value, 4) for value in mean.tolist()), tuple(std)


def write_suspected(path: Path, data: Dataset[Any], indices: Sequence[int]) -> None:
    """One line for each suspected sample: its index in the data, and the path of its image if the data is a folder."""
    folder = data if isinstance(data, ClassFolders) else None
    # Names of files need not be valid text.
    text = partial(open, mode="w", newline="", encoding="utf-8", errors="surrogateescape")
    with whole_file(path) as temporary, text(temporary) as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["index", "path"] if folder else ["index"])
        lines.writerows([index, folder.samples[index][0]] if folder else [index] for index in indices)
