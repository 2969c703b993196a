"""How much two sets of features depend on each other, without a network that estimates it: HSIC."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """The Hilbert-Schmidt independence criterion [] of features [B, D] and [B, E] of the same B samples.

    tr(K H L H) / (B - 1)^2 (Gretton et al., "Measuring statistical dependence with Hilbert-Schmidt norms", ALT 2005,
    the biased estimate), where K and L are Gaussian kernels exp(-d^2 / m) with m the median squared distance between
    different samples, through which no gradient flows, and H centres. It is zero for features that do not depend on
    each other, up to chance, and at least zero always.
    """
    k, l = _centred(_kernel(x)), _kernel(y)  # noqa: E741, its name in the formula
    return (k * l).sum() / max(1, len(x) - 1) ** 2


def _kernel(x: Tensor) -> Tensor:
    # By inner products, which need no [B, B, D]; of centred features, as these lose less to rounding.
    centred = x - x.mean(0, keepdim=True).detach()
    lengths = centred.square().sum(1)
    same = torch.eye(len(x), dtype=torch.bool, device=x.device)
    squared = (lengths.unsqueeze(1) + lengths - 2 * centred @ centred.T).clamp(min=0).masked_fill(same, 0)
    width = squared.detach()[~same].median() if len(x) > 1 else lengths.detach().sum()
    return (-squared / width.clamp(min=torch.finfo(x.dtype).tiny)).exp()


def _centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(0, keepdim=True) - kernel.mean(1, keepdim=True) + kernel.mean()


class Inputs:
    """What one module of a network was given in its last pass, seen by a hook.

    Attributes:
        values: [B, ...].
    """

    def __init__(self, module: nn.Module) -> None:
        self.values: Tensor
        self._handle = module.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.values = inputs[0]

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()
