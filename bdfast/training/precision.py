"""Mixed precision: bfloat16 where the device computes in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; without them it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


def autocast(device: torch.device, amp: bool) -> AbstractContextManager[Any]:
    """bfloat16 for the forward passes inside, where `amp` is on and the device computes in it."""
    if amp and computes_in_bfloat16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
