"""MobileNetV2 (Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018) for small images.

Names in `features` are those of torchvision, so that its weights load there.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from bdfast.models.sizes import check_sizes

STEM, LAST = 32, 1280
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels at the published width, blocks and stride of the first block; the second stage has 2 there in the
paper."""


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel by a 3x3 one, project by a 1x1 one; added to the input if it can
    be."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [] if expansion == 1 else [_convolution(in_channels, hidden, 1)]
        self.conv = nn.Sequential(
            *expand,
            _convolution(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.adds = stride == 1 and in_channels == channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, H, W] -> [B, channels, H / stride, W / stride]."""
        return x + self.conv(x) if self.adds else self.conv(x)


class SmallMobileNetV2(nn.Module):
    """17 inverted residuals between two convolutions, then an average over all positions and a linear classifier.

    As usual for small images, the first convolution and the second stage have a stride of 1 where the published network
    has 2, so that the side shrinks by 8 and not by 32. All channels are scaled by width / 32 and rounded, also those
    of the last convolution, which the paper does not make narrower than 1280. There is no dropout. Fresh weights are
    drawn as torchvision does.

    Args:
        num_classes: Number of outputs.
        width: Channels of the first convolution; 32 is published (2.2 M parameters without the classifier).
        in_channels: Channels of the input image.

    Raises:
        ValueError: A size is no whole number of at least 1.
    """

    def __init__(self, num_classes: int, *, width: int = STEM, in_channels: int = 3) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, width=width, in_channels=in_channels)
        layers: list[nn.Module] = [_convolution(in_channels, width, 3)]
        before = width
        for expansion, published, blocks, first_stride in STAGES:
            channels = _scaled(published, width)
            for block in range(blocks):
                layers.append(InvertedResidual(before, channels, 1 if block else first_stride, expansion))
                before = channels
        last = _scaled(LAST, width)
        self.features = nn.Sequential(*layers, _convolution(before, last, 1))
        self.classifier = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, H, W] -> logits [B, num_classes]; any H and W."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def _convolution(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU6."""
    return Conv2dNormActivation(
        # Not in place: a hook that keeps the output of the BatchNorm would find it changed.
        in_channels,
        channels,
        kernel,
        stride,
        groups=groups,
        activation_layer=nn.ReLU6,
        inplace=False,
    )


def _scaled(published: int, width: int) -> int:
    return max(1, round(published * width / STEM))
