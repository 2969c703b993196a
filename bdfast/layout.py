"""Memory layout of a network while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bdfast.training import computes_in_bfloat16


def channels_last_pays(model: nn.Module, device: torch.device, amp: bool) -> bool:
    """Whether convolutions of this network run faster with the channels innermost; bench/README.md has figures.

    By the kind of the device and not by a stopwatch, so that a seed gives the same bits on every call. Graphics cards
    want the layout for the 16-bit formats only.
    """
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return convolves and (device.type == "cpu" or (amp and computes_in_bfloat16(device)))


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Inside, weights of four dimensions have their channels innermost; after it everything lies as before."""
    tensors = [x for x in (*model.parameters(), *model.buffers()) if x.ndim == 4 and x.is_contiguous()]
    model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for x in tensors:
            x.data = x.data.contiguous()
