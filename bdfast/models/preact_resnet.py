"""PreAct-ResNet18 (He et al., "Identity mappings in deep residual networks", ECCV 2016) of any width and stem.

Module names and state-dict keys are those of the 32x32 networks that the backdoor literature trains (`conv1`,
`layer1` .. `layer4`, `linear`, no final BatchNorm), so that weights of either side load into the other.
"""

import torch
from torch import nn
from torch.nn import functional as F

from bdfast.models.sizes import check_sizes

Stem = str
STEMS: dict[Stem, tuple[int, int]] = {"cifar": (3, 1), "stride2": (3, 2), "imagenet": (7, 2)}
"""Kernel size and stride of the first convolution; "imagenet" is followed by a max-pool of stride 2."""


class PreActBlock(nn.Module):
    """BatchNorm, ReLU and convolution, twice, beside a shortcut that starts after the first ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        if stride != 1 or in_channels != channels:
            self.shortcut: nn.Sequential | None = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))
        else:
            self.shortcut = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, H, W] -> [B, channels, H / stride, W / stride]."""
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        return self.conv2(F.relu(self.bn2(out))) + shortcut


class PreActResNet18(nn.Module):
    """Four stages of two blocks; `width` channels in the first, doubling from stage to stage.

    Args:
        num_classes: Number of outputs.
        width: Channels of the first stage; 64 is the published network (11.2 M parameters).
        in_channels: Channels of the input image.
        stem: A key of `STEMS`.

    Raises:
        ValueError: The stem is another, or a size is no whole number of at least 1.
    """

    def __init__(self, num_classes: int, *, width: int = 64, in_channels: int = 3, stem: Stem = "cifar") -> None:
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem: expected one of {', '.join(STEMS)}, got {stem!r}; choose one of these.")
        check_sizes(num_classes=num_classes, width=width, in_channels=in_channels)
        kernel, stride = STEMS[stem]
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        channels = width
        for stage in range(4):
            out_channels = width * 2**stage
            blocks = [
                PreActBlock(channels, out_channels, stride=1 if stage == 0 else 2),
                PreActBlock(out_channels, out_channels, stride=1),
            ]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            channels = out_channels
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, H, W] -> logits [B, num_classes]; any H and W of at least 16."""
        out = self.pool(self.conv1(x))
        for stage in range(4):
            out = self.get_submodule(f"layer{stage + 1}")(out)
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
