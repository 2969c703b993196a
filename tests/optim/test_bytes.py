"""How many bytes a step moves beside forward and backward, counted, and how much memory it takes."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bdfast.ops.backends import backends
from bdfast.optim import PAM, SAM, GradientNorm

FINITE = 4
"""Bytes a parameter to see that the second gradient is finite, which no published step does."""


class Bytes(TorchDispatchMode):
    """Counts the bytes of every call on tensors, and those of the tensors that a call makes.

    Of the ops of this project the passes over memory are known: their docstrings state them. Any other op reads its
    arguments and writes its results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.made = 0
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().rpartition("::")[2].partition(".")[0]
        arguments = [list(a) if isinstance(a, list | tuple) else [a] for a in args]
        sizes = [sum(x.nbytes for x in tree_leaves(a) if isinstance(x, torch.Tensor)) for a in arguments]
        if name == "perturb_":
            params, dirs, saved, norm, _, mode, *_ = sizes[:4] + [a[0] for a in arguments[4:]]
            first = 0 if norm else dirs + (0 if mode == "sam" else params)
            self._count(name, first + 2 * params + dirs + saved)
        elif name == "neuron_norms":
            self._count(name, sum(sizes[:2]))
        elif name == "sharp_step_":
            params, saved, second, buffers, first, reference = sizes[:6]
            self._count(name, params + saved + second + 2 * buffers + first + reference)
        elif not func.is_view:
            before = {x.data_ptr() for a in arguments for x in tree_leaves(a) if isinstance(x, torch.Tensor)}
            results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self.made += sum(x.nbytes for x in results if x.data_ptr() not in before)
            written = sum(sizes[:1]) if name.endswith("_") else sum(x.nbytes for x in results)
            self._count(name, sum(sizes) + written)
        return result

    def _count(self, name: str, size: int) -> None:
        self.moved += size
        self.calls.append(name)


SHAPES = [(64, 3, 7, 7), (256, 64, 3, 3), (256,), (512, 256, 3, 3), (1000, 512), (1000,)]

STEPS = {
    "tsbd": (lambda p, r, **o: GradientNorm(p, torch.optim.SGD, rho=0.05, alpha=0.7, scope="tensor", **o), 44),
    "ft_sam": (lambda p, r, **o: SAM(p, torch.optim.SGD, rho=2.0, adaptive=True, **o), 44),
    "sam": (lambda p, r, **o: SAM(p, torch.optim.SGD, rho=0.05, **o), 40),
    "pam": (lambda p, r, **o: PAM(p, torch.optim.SGD, reference=r, rho=0.5, **o), 40),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_moves_what_it_must(name, skip_without):
    skip_without("cpu", backends()["cpu"].reason)
    make, expected = STEPS[name]
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    reference = [param.detach() + 0.01 for param in params]
    size = sum(param.nbytes for param in params)
    optimizer = make(params, reference, lr=0.1, momentum=0.9, weight_decay=5e-4)

    def gradients() -> None:
        for param in params:
            param.grad = torch.randn_like(param) * 0.01

    def step() -> Bytes:
        if optimizer.needs_gradient:
            gradients()
        counted = Bytes()
        with counted:
            optimizer.first_step(zero_grad=True)
        gradients()
        with counted:
            optimizer.second_step()
        return counted

    first = step()
    # The saved weights and the momentum; of the latter SGD has as much.
    assert first.made == pytest.approx(2 * size, rel=0.005)
    again = step()
    assert again.moved / size * 4 == pytest.approx(expected + FINITE, rel=0.005)
    assert again.made < 0.01 * size  # sums over neurons; PAM looks at a weight of each, before the step and after it
    assert sum(buffer.nbytes for buffer in optimizer._saved.values()) == size
    assert again.calls.count("perturb_") == again.calls.count("sharp_step_") == 1
