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
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return convolves and (device.type == "cpu" or (amp and computes_in_bfloat16(device)))


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
