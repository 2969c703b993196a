"""Memory format of a network while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bdfast.training.precision import computes_in_bfloat16


def channels_last_pays(model: nn.Module, device: torch.device, amp: bool) -> bool:
    """Whether convolutions of this network run faster with the channels innermost; bench/README.md has figures.

    Decided by the kind of the device and not by timing, so that a seed gives the same bits on every call. On GPUs the
    format is used only for 16-bit types.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions or any(map(_breaks, convolutions)):
        return False
    return device.type == "cpu" or (amp and computes_in_bfloat16(device))


def _breaks(convolution: nn.Conv2d) -> bool:
    """Whether torch 2.14 corrupts the heap in its backward pass on a CPU with AVX2 alone: 1x1, strided, few channels.

    Seen with 3, 4 and 6 input channels, and with 8 and more never.
    """
    strided = max(convolution.stride) > 1 and max(convolution.kernel_size) == 1
    return strided and convolution.in_channels // convolution.groups < 8


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Inside, weights of four dimensions are channels-last; the original memory format is restored on exit."""
    tensors = [x for x in (*model.parameters(), *model.buffers()) if x.ndim == 4 and x.is_contiguous()]
    for x in tensors:  # not model.to(memory_format=...), which refuses tensors of five dimensions
        x.data = x.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for x in tensors:
            x.data = x.data.contiguous()
