"""How to build a network again: a small description that travels inside the checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torchvision
from torch import nn

from bdfast.errors import nearest
from bdfast.models.normalization import normalized
from bdfast.models.preact_resnet import PreActResNet18, Stem

OWN = "preact_resnet18"


@dataclass(frozen=True)
class ModelSpec:
    """An architecture with its arguments.

    Attributes:
        arch: "preact_resnet18", a name given to `register_model`, or the name of a classifier of torchvision
            (resnet18, vit_b_16, ...).
        num_classes: Number of outputs.
        in_channels: Channels of the image; torchvision's networks take 3.
        width: Channels of the first stage of preact_resnet18.
        stem: First layer of preact_resnet18: cifar, stride2 or imagenet.
        mean: Mean per channel that the network subtracts; no normalisation when left out.
        std: Standard deviation per channel that it divides by.
        class_names: Names of the outputs, in their order; folders of images are matched with them.
    """

    arch: str = OWN
    num_classes: int = 10
    in_channels: int = 3
    width: int = 64
    stem: Stem = "cifar"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The network with fresh weights.

        Raises:
            ValueError: There is no such architecture; the message names the nearest.
        """
        network: nn.Module
        if self.arch in ARCHITECTURES:
            network = ARCHITECTURES[self.arch](self)
        else:
            known = torchvision.models.list_models(module=torchvision.models)
            if self.arch not in known:
                raise ValueError(
                    f"arch: expected one of {', '.join(ARCHITECTURES)}, or a classifier of torchvision, got "
                    f"{self.arch!r}; {nearest(self.arch, [*ARCHITECTURES, *known])}"
                )
            network = torchvision.models.get_model(self.arch, weights=None, num_classes=self.num_classes)
        return normalized(network, self.mean, self.std) if self.mean else network

    def to_json(self) -> str:
        """As text, for the metadata of a checkpoint."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """From the text of `to_json`, which may come from a stranger.

        Raises:
            ValueError: It is something else.
        """
        try:
            values = json.loads(text)
            values["mean"], values["std"] = tuple(values["mean"]), tuple(values["std"])
            values["class_names"] = tuple(values.get("class_names", ()))
            spec = cls(**values)
            sizes = (spec.num_classes, spec.in_channels, spec.width)
            sound = all(isinstance(size, int) and 0 < size < 1_000_000 for size in sizes)
            sound &= len(spec.class_names) in (0, spec.num_classes)
            sound &= all(isinstance(name, str) for name in spec.class_names)
            float(sum(spec.mean) + sum(spec.std))  # numbers all
            if not isinstance(spec.arch, str) or not isinstance(spec.stem, str):
                raise TypeError("a name that is no text")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"model description: expected one that bdfast wrote, got {text[:80]!r}; leave it out of the file."
            ) from error
        if not sound:
            raise ValueError(
                f"model description: expected sizes between 1 and a million and a name for each class, got {sizes} and "
                f"{len(spec.class_names)} names; leave it out of the file."
            )
        return spec


Builder = Callable[[ModelSpec], nn.Module]


def register_model(name: str, builder: Builder) -> None:
    """Make a network of your own known under `name`: to `ModelSpec`, its checkpoints and the command line.

        bdfast.models.register_model("mine", lambda spec: MyNetwork(spec.num_classes, channels=spec.in_channels))

    A second registration of a name replaces the first.

    Args:
        name: Lower-case letters, digits, "_" and "-".
        builder: From a `ModelSpec` to the network with fresh weights, without the normalisation of its input.

    Raises:
        ValueError: The name has other characters, or is that of bdfast's own network.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ValueError(f"name: expected lower-case letters, digits, '_' and '-', got {name!r}; choose such a name.")
    if name == OWN:
        raise ValueError(f"name: expected one that is free, got {name!r}; take another.")
    ARCHITECTURES[name] = builder


def _preact_resnet18(spec: ModelSpec) -> nn.Module:
    return PreActResNet18(spec.num_classes, width=spec.width, in_channels=spec.in_channels, stem=spec.stem)


ARCHITECTURES: dict[str, Builder] = {OWN: _preact_resnet18}
"""bdfast's own network by its name, and those of `register_model`."""
