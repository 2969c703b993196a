"""Times of two defenses' own parts beside the published way, on PreAct-ResNet18 of its published width.

    .venv/bin/python -m bench.peers

CLP: the largest singular value of 3,392 channels, beside a decomposition for each. OTBR: the fusion of all layers.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch
from rich.console import Console
from torch import nn

import bdfast
from bdfast.defenses import CLPDefense, OTBRDefense
from bdfast.defenses.clp import channel_norms, stretch
from bdfast.models import ModelSpec

ROUNDS = 5


def main() -> None:
    torch.manual_seed(0)
    model = ModelSpec(arch="preact_resnet18", num_classes=10).build().eval()
    show = Console().print
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    pairs = [(norms[name], convolution) for name, convolution in CLPDefense().pairs(model).items()]
    batched, looped = [], []
    for _ in range(ROUNDS):
        started = perf_counter()
        bounds = torch.cat([channel_norms(convolution.weight) * stretch(norm) for norm, convolution in pairs])
        batched.append(perf_counter() - started)
        started = perf_counter()
        expected = one_by_one(pairs)
        looped.append(perf_counter() - started)
        torch.testing.assert_close(bounds, expected.double(), rtol=1e-4, atol=0)
    ratio = median(looped) / median(batched)
    show(f"CLP: {len(bounds):,} channels, singly {median(looped):.3f} s, together {median(batched):.3f} s: {ratio:.1f}")

    otbr = OTBRDefense(gamma=0.2, image_shape=(3, 32, 32), unlearn_steps=1, unlearn_batch=8)
    result = bdfast.purify(model, None, method=otbr)
    layers = result.found["aligned_layers"]
    show(f"OTBR: {layers} layers aligned; all of it, with one step of unlearning, {result.seconds:.1f} s")


@torch.no_grad()
def one_by_one(pairs: list[tuple[nn.BatchNorm2d, nn.Module]]) -> torch.Tensor:
    """As the published code does it."""
    bounds = []
    for norm, convolution in pairs:
        assert norm.running_var is not None
        deviation = (norm.running_var + norm.eps).sqrt()
        kernels: torch.Tensor = convolution.weight
        for channel in range(len(norm.weight)):
            factor = (norm.weight[channel] / deviation[channel]).abs()
            kernel = kernels[channel].reshape(kernels.shape[1], -1) * factor
            bounds.append(torch.svd(kernel.cpu())[1].max())
    return torch.stack(bounds)


if __name__ == "__main__":
    main()
