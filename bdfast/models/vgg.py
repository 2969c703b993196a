"""VGG (Simonyan & Zisserman, "Very deep convolutional networks for large-scale image recognition", 2014).

This is the form that the backdoor literature trains on small images: the published convolutions, then an average over
all positions and one linear classifier in place of three. Names in `features` are those of torchvision, so that its
weights of the convolutions load.
"""

import torch
from torch import nn
from torch.nn import functional as F

from bdfast.models.sizes import check_sizes

CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}
"""Depth, as published, to the convolutions between two max-pools: configurations A and D of the paper."""


class SmallVGG(nn.Module):
    """Five stages of 3x3 convolutions with 1, 2, 4, 8 and 8 times `width` channels, each followed by a max-pool.

    Fresh weights of the convolutions are drawn by the number of inputs (He et al., "Delving deep into rectifiers",
    ICCV 2015). Drawn by the number of outputs, as torchvision does, a narrow VGG16 without BatchNorm stayed at chance.
    A max-pool of an odd size keeps the border, so that images of 28 pixels and of any other size pass all five; at
    multiples of 32 that makes no difference.

    Args:
        num_classes: Number of outputs.
        depth: 11 or 16.
        batch_norm: A BatchNorm behind each convolution, as torchvision's vgg16_bn has and the paper has not.
        width: Channels of the first stage; 64 is published (depth 16: 14.7 M parameters in the convolutions).
        in_channels: Channels of the input image.

    Raises:
        ValueError: The depth is another, or a size is no whole number of at least 1.
    """

    def __init__(
        self, num_classes: int, *, depth: int = 16, batch_norm: bool = True, width: int = 64, in_channels: int = 3
    ) -> None:
        super().__init__()
        if depth not in CONVOLUTIONS:
            raise ValueError(
                f"depth: expected one of {', '.join(map(str, CONVOLUTIONS))}, got {depth!r}; choose one of these."
            )
        check_sizes(num_classes=num_classes, width=width, in_channels=in_channels)
        layers: list[nn.Module] = []
        before = in_channels
        for multiple, convolutions in zip((1, 2, 4, 8, 8), CONVOLUTIONS[depth], strict=True):
            channels = width * multiple
            for _ in range(convolutions):
                layers.append(nn.Conv2d(before, channels, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(channels))
                layers.append(nn.ReLU())
                before = channels
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_channels, H, W] -> logits [B, num_classes]; any H and W."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
