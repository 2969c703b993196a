"""Networks that turn an image into a small change of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from bdfast.attacks.encoder_decoder import encode_decode, fresh_weights
from bdfast.task import at_least_float32

DENSE = 12_288
"""Values of an image up to which the published fully connected network is used: 64 x 64 in three colours."""

HIDDEN = 1024
WIDTH = 16


class Perturbed(nn.Module):
    """x -> x + eps g(x), clipped to the range of the pixels, with g in [-1, 1].

    Args:
        network: g without its last tanh.
        eps: Greatest change of a value.
        limits: Least and greatest pixel value.
    """

    def __init__(self, network: nn.Module, eps: float, limits: tuple[float, float]) -> None:
        super().__init__()
        self.network, self.eps, self.limits = network, eps, limits

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        own = next(self.network.parameters()).dtype
        change = self.eps * torch.tanh(at_least_float32(self.network(images.to(own))))
        return (images + change.to(images.dtype)).clamp(*self.limits)


class Behind(nn.Module):
    """A network that sees every image perturbed.

    Args:
        network: Any classifier of images.
        perturbed: What is done to them.
    """

    def __init__(self, network: nn.Module, perturbed: nn.Module) -> None:
        super().__init__()
        self.network, self.perturbed = network, perturbed

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> what the network says."""
        answer: Tensor = self.network(self.perturbed(images))
        return answer


class FullyConnected(nn.Sequential):
    """Three hidden layers with ReLU, as in the published script: 3072-1024-1024-1024-3072 for 32 x 32 in colour.

    Args:
        shape: [C, H, W] of the images.
        hidden: Units of each hidden layer.
    """

    def __init__(self, shape: Sequence[int], hidden: int) -> None:
        size = math.prod(shape)
        widths = [size, hidden, hidden, hidden, size]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1], nn.Unflatten(1, tuple(shape)))


class Convolutional(nn.Module):
    """An encoder-decoder for images of any size. Ours: the fully connected one has 300 million weights at 224 x 224.

    Args:
        shape: [C, H, W] of the images.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        weights = fresh_weights(shape[0], shape[0], WIDTH)
        self.names = list(weights)
        self.weights = nn.ParameterList(weights.values())

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return encode_decode(dict(zip(self.names, self.weights, strict=True)), images)


def network_for(shape: Sequence[int]) -> nn.Module:
    """Fully connected for images of up to `DENSE` values, else convolutional; weights from torch's generator."""
    return FullyConnected(shape, HIDDEN) if math.prod(shape) <= DENSE else Convolutional(shape)
