"""Where channels-last and bfloat16 pay: forward and backward of one batch, interleaved, as Markdown.

.venv/bin/python -m bench.layout
"""

from __future__ import annotations

import statistics
from itertools import product
from time import perf_counter

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet50, vit_b_16

from bdfast.models import PreActResNet18
from bench.lists import DEVICE

ROUNDS = 7
CASES = {
    "PreAct-ResNet18, width 16, 256 of 1x28x28": (
        lambda: PreActResNet18(10, width=16, in_channels=1),
        (256, 1, 28, 28),
    ),
    "ResNet-18, 16 of 3x224x224": (resnet18, (16, 3, 224, 224)),
    "ResNet-50, 8 of 3x224x224": (resnet50, (8, 3, 224, 224)),
    "ViT-B/16, 4 of 3x224x224": (vit_b_16, (4, 3, 224, 224)),
}
WAYS = list(product((torch.float32, torch.bfloat16), (torch.contiguous_format, torch.channels_last)))


def seconds(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> float:
    labels = torch.zeros(len(images), dtype=torch.long, device=DEVICE)
    started = perf_counter()
    model.zero_grad()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not torch.float32):
        logits = model(images)
    F.cross_entropy(logits.float(), labels).backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return perf_counter() - started


def main() -> None:
    print("| network, batch | float32 | float32, channels-last | bfloat16 | bfloat16, channels-last |")
    print("|---|---|---|---|---|")
    for name, (build, shape) in CASES.items():
        images = torch.rand(shape, device=DEVICE)
        models = {layout: build().to(DEVICE, memory_format=layout).train() for _, layout in WAYS[:2]}
        times: dict[tuple, list[float]] = {way: [] for way in WAYS}
        for turn in range(ROUNDS + 1):
            for way in WAYS:
                dtype, layout = way
                taken = seconds(models[layout], images, dtype)
                if turn:  # the first warms up
                    times[way].append(taken)
        print(
            f"| {name} | {' | '.join(f'{1000 * statistics.median(times[way]):.0f} ms' for way in WAYS)} |", flush=True
        )


if __name__ == "__main__":
    main()
