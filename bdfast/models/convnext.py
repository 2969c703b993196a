"""ConvNeXt (Liu et al., "A ConvNet for the 2020s", CVPR 2022) for small images.

Names are those of torchvision, so that its weights load: all of them with `patch_size=4`, all but those of the first
convolution otherwise.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import Permute

from bdfast.models.sizes import check_sizes

STAGES = ((1, 1), (2, 1), (4, 3), (8, 1))
"""Channels of a stage in multiples of `width`, and its blocks in multiples of `depth`."""


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels at each position."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same shape."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchConvolution(nn.Conv2d):
    """A convolution whose stride is its kernel size. Sides that it does not divide are padded with zeros."""

    def __init__(self, in_channels: int, channels: int, size: int) -> None:
        super().__init__(in_channels, channels, size, stride=size)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, H, W] -> [B, channels, H / size, W / size], rounded up."""
        size = self.kernel_size[0]
        bottom, right = -input.shape[-2] % size, -input.shape[-1] % size
        return super().forward(F.pad(input, (0, right, 0, bottom)) if bottom or right else input)


class ConvNeXtBlock(nn.Module):
    """A 7x7 convolution of each channel, LayerNorm, and two linear layers with GELU between; scaled and added."""

    def __init__(self, channels: int, layer_scale: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(channels, eps=1e-6),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute([0, 3, 1, 2]),
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels, H, W] -> the same shape."""
        return x + self.layer_scale * self.block(x)


class SmallConvNeXt(nn.Module):
    """Four stages with 1, 2, 4 and 8 times `width` channels and `depth`, `depth`, 3 x `depth` and `depth` blocks.

    Fresh weights are drawn as published, and there is no stochastic depth. Blocks start with a scale of 1 in place of
    the published 1e-6, at which SGD leaves them without effect for long: in trials with 6 and 18 blocks it learned
    faster from 1, and AdamW, which the paper uses, as fast from both.

    Args:
        num_classes: Number of outputs.
        width: Channels of the first stage; 96 is published (ConvNeXt-T, 27.8 M parameters without the classifier).
        depth: Blocks of the first stage; 3 is published.
        in_channels: Channels of the input image.
        patch_size: Kernel and stride of the first convolution, in pixels; 4 is published, for images of 224 pixels.
        layer_scale: What the scales of the blocks start from; 1e-6 is published.

    Raises:
        ValueError: A size is no whole number of at least 1.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: int = 96,
        depth: int = 3,
        in_channels: int = 3,
        patch_size: int = 2,
        layer_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, width=width, depth=depth, in_channels=in_channels, patch_size=patch_size)
        layers: list[nn.Module] = [nn.Sequential(PatchConvolution(in_channels, width, patch_size), ChannelNorm(width))]
        before = width
        for multiple, blocks in STAGES:
            channels = width * multiple
            if channels != before:
                layers.append(nn.Sequential(ChannelNorm(before), PatchConvolution(before, channels, 2)))
            layers.append(nn.Sequential(*(ConvNeXtBlock(channels, layer_scale) for _ in range(blocks * depth))))
            before = channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(ChannelNorm(before), nn.Flatten(1), nn.Linear(before, num_classes))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, H, W] -> logits [B, num_classes]; any H and W."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1))
