"""A small convolutional network from images to maps of the same size, as a function of its weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

GROUPS = 4
OUT = "out"


def fresh_weights(in_channels: int, out_channels: int, width: int) -> dict[str, torch.Tensor]:
    """Weights by name, drawn from torch's generator as `nn.Conv2d` does.

    Args:
        in_channels: Channels of the images.
        out_channels: Channels of what comes out.
        width: Channels of the first level, a multiple of 4; twice as many below.
    """
    deep = 2 * width
    blocks = {
        "first": (in_channels, width),
        "first2": (width, width),
        "second": (width, deep),
        "second2": (deep, deep),
        "middle": (deep, deep),
        "up": (deep, width),
    }
    weights: dict[str, torch.Tensor] = {}
    for name, (inputs, outputs) in blocks.items():
        weights[f"{name}.weight"] = nn.Conv2d(inputs, outputs, 3).weight.detach()
        weights[f"{name}.scale"] = torch.ones(outputs)
        weights[f"{name}.shift"] = torch.zeros(outputs)
    last = nn.Conv2d(width, out_channels, 3)
    return weights | {f"{OUT}.weight": last.weight.detach(), f"{OUT}.shift": last.bias.detach()}  # type: ignore[union-attr]


def encode_decode(weights: Mapping[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """[B, in_channels, H, W] in [0, 1] -> [B, out_channels, H, W], for any H and W.

    Two levels down and up again. What it says about an image does not depend on the others of the batch: the
    normalisation is by groups of channels.
    """

    def block(name: str, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, weights[f"{name}.weight"], padding=1)
        return F.relu(F.group_norm(x, GROUPS, weights[f"{name}.scale"], weights[f"{name}.shift"]))

    first = block("first2", block("first", 2 * images - 1))
    second = block("second2", block("second", F.max_pool2d(first, 2, ceil_mode=True)))
    x = block("middle", F.max_pool2d(second, 2, ceil_mode=True))
    x = block("up", F.interpolate(x, size=second.shape[-2:]))
    x = F.interpolate(x, size=first.shape[-2:])
    return F.conv2d(x, weights[f"{OUT}.weight"], weights[f"{OUT}.shift"], padding=1)
