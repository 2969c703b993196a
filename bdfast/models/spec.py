"""How to build a network again: a small description that travels inside the checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

import torchvision
from torch import nn

from bdfast.errors import nearest
from bdfast.models.convnext import SmallConvNeXt
from bdfast.models.mobilenet import SmallMobileNetV2
from bdfast.models.normalization import normalized
from bdfast.models.preact_resnet import PreActResNet18, Stem
from bdfast.models.vgg import SmallVGG
from bdfast.models.vit import SmallViT

MOST_BLOCKS = 1000


@dataclass(frozen=True)
class ModelSpec:
    """An architecture with its arguments.

    Attributes:
        arch: preact_resnet18, small_vgg11, small_vgg11_bn, small_vgg16, small_vgg16_bn, small_mobilenet_v2, small_vit,
            small_convnext, or a name of `register_model`; the name of a classifier of torchvision (resnet18, vit_b_16,
            ...); or "timm/" and the name of a network of timm, which has to be installed.
        num_classes: Number of outputs.
        in_channels: Channels of the image; torchvision's networks take 3.
        width: Channels of the first layers, for bdfast's own networks; the published number when left out.
        stem: First layer of preact_resnet18: cifar, stride2 or imagenet.
        mean: Mean per channel that the network subtracts; no normalisation when left out.
        std: Standard deviation per channel that it divides by.
        class_names: Names of the outputs, in their order; folders of images are matched with them.
        depth: Number of blocks of small_vit, or of the first stage of small_convnext; the published number when left
            out.
        image_size: Height and width of the image in pixels, which small_vit is built for.
    """

    arch: str = "preact_resnet18"
    num_classes: int = 10
    in_channels: int = 3
    width: int | None = None
    stem: Stem = "cifar"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()
    depth: int | None = None
    image_size: int = 32

    def build(self) -> nn.Module:
        """The network with fresh weights; nothing is downloaded.

        Raises:
            ValueError: There is no such architecture, and the message names the nearest; it does not take one of the
                arguments; or it is one of timm, which is not installed.
        """
        if self.arch in ARCHITECTURES:
            network = ARCHITECTURES[self.arch](self)
        elif self.arch.startswith(TIMM):
            network = _of_timm(self)
        else:
            network = _of_torchvision(self)
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
            sizes = (spec.num_classes, spec.in_channels, spec.image_size, spec.width, spec.depth)
            sound = all(isinstance(size, int) and 0 < size < 1_000_000 for size in sizes[:3])
            sound &= spec.width is None or (isinstance(spec.width, int) and 0 < spec.width < 1_000_000)
            sound &= spec.depth is None or (isinstance(spec.depth, int) and 0 < spec.depth <= MOST_BLOCKS)
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
                f"model description: expected sizes between 1 and a million, a depth of at most {MOST_BLOCKS} and a "
                f"name for each class, got {sizes} and {len(spec.class_names)} names; leave it out of the file."
            )
        if spec.arch not in ARCHITECTURES:
            # Descriptions once gave a width and a stem for the networks of torchvision, too.
            spec = replace(spec, width=None, stem="cifar")
        return spec


Builder = Callable[[ModelSpec], nn.Module]
TIMM = "timm/"


def register_model(name: str, builder: Builder) -> None:
    """Make a network of your own known under `name`: to `ModelSpec`, its checkpoints and the command line.

        bdfast.models.register_model("mine", lambda spec: MyNetwork(spec.num_classes, channels=spec.in_channels))

    A second registration of a name replaces the first. The command line learns of it with `bdfast --import my_file.py
    purify METHOD weights.pt --arch mine`.

    Args:
        name: Lower-case letters, digits, "_" and "-".
        builder: From a `ModelSpec` to the network with fresh weights, without the normalisation of its input.

    Raises:
        ValueError: The name has other characters, or is one of bdfast's or torchvision's own.
        TypeError: The builder cannot be called.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ValueError(f"name: expected lower-case letters, digits, '_' and '-', got {name!r}; choose such a name.")
    if name in _OWN or name in _known_to_torchvision():
        raise ValueError(f"name: expected one that is free, got {name!r}; take another.")
    if not callable(builder):
        raise TypeError(f"builder: expected a function of a ModelSpec, got {builder!r}; pass the class or a lambda.")
    ARCHITECTURES[name] = builder


def _preact_resnet18(spec: ModelSpec) -> nn.Module:
    _refuse(spec, "depth")
    return PreActResNet18(spec.num_classes, in_channels=spec.in_channels, stem=spec.stem, **_given(spec, "width"))


def _vgg(depth: int, *, batch_norm: bool) -> Builder:
    def build(spec: ModelSpec) -> nn.Module:
        _refuse(spec, "depth", "stem")
        return SmallVGG(
            spec.num_classes,
            depth=depth,
            batch_norm=batch_norm,
            in_channels=spec.in_channels,
            **_given(spec, "width"),
        )

    return build


def _mobilenet_v2(spec: ModelSpec) -> nn.Module:
    _refuse(spec, "depth", "stem")
    return SmallMobileNetV2(spec.num_classes, in_channels=spec.in_channels, **_given(spec, "width"))


def _vit(spec: ModelSpec) -> nn.Module:
    _refuse(spec, "stem")
    return SmallViT(
        spec.num_classes,
        in_channels=spec.in_channels,
        image_size=spec.image_size,
        **_given(spec, "width", "depth"),
    )


def _convnext(spec: ModelSpec) -> nn.Module:
    _refuse(spec, "stem")
    return SmallConvNeXt(spec.num_classes, in_channels=spec.in_channels, **_given(spec, "width", "depth"))


ARCHITECTURES: dict[str, Builder] = {
    "preact_resnet18": _preact_resnet18,
    "small_vgg11": _vgg(11, batch_norm=False),
    "small_vgg11_bn": _vgg(11, batch_norm=True),
    "small_vgg16": _vgg(16, batch_norm=False),
    "small_vgg16_bn": _vgg(16, batch_norm=True),
    "small_mobilenet_v2": _mobilenet_v2,
    "small_vit": _vit,
    "small_convnext": _convnext,
}
"""Every network of bdfast by its name, and those of `register_model`."""

_OWN = frozenset(ARCHITECTURES)


def _of_torchvision(spec: ModelSpec) -> nn.Module:
    known = _known_to_torchvision()
    if spec.arch not in known:
        raise ValueError(
            f"arch: expected one of {', '.join(ARCHITECTURES)}, a classifier of torchvision or {TIMM}NAME, got "
            f"{spec.arch!r}; {nearest(spec.arch, [*ARCHITECTURES, *known])}"
        )
    _refuse(spec, "width", "depth", "stem")
    if spec.in_channels != 3:
        raise ValueError(
            f"in_channels: expected 3 for {spec.arch}, as torchvision's networks take colour images, got "
            f"{spec.in_channels}; repeat a grey channel three times, or choose one of {', '.join(ARCHITECTURES)}."
        )
    return torchvision.models.get_model(spec.arch, weights=None, num_classes=spec.num_classes)


def _known_to_torchvision() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _of_timm(spec: ModelSpec) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(
            f"arch: expected timm to be installed for {spec.arch!r}, got: {error}; run `pip install timm`."
        ) from error
    name, known = spec.arch.removeprefix(TIMM), timm.list_models()
    # Its constructor also takes names of folders and of files to download.
    if name not in known:
        raise ValueError(
            f"arch: expected {TIMM} and a name from timm.list_models(), got {spec.arch!r}; "
            f"{nearest(spec.arch, [TIMM + name for name in known])}"
        )
    _refuse(spec, "width", "depth", "stem")
    return timm.create_model(name, pretrained=False, in_chans=spec.in_channels, num_classes=spec.num_classes)


def _given(spec: ModelSpec, *names: str) -> dict[str, int]:
    """The arguments that do not keep their published value."""
    return {name: value for name in names if (value := getattr(spec, name)) is not None}


def _refuse(spec: ModelSpec, *names: str) -> None:
    """Refuse what the architecture would ignore."""
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.name in names and value != field.default:
            raise ValueError(
                f"{field.name}: expected none for {spec.arch}, which has no such argument, got {value!r}; leave it out."
            )
