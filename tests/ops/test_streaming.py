"""Large lists are written past the caches; whether they are must not show."""

import pytest
import torch

from bdfast import ops

STREAMED_BYTES = 16 << 20  # kStreamedBytes of csrc/cpu/memory.h


def large_list(dtype, seed):
    """Tensors that start at every place within a line of memory, and end at any, with odd small ones between."""
    generator = torch.Generator().manual_seed(seed)
    elements = STREAMED_BYTES // dtype.itemsize // 33 + 1
    bases = [torch.randn(elements + 70, generator=generator).to(dtype) for _ in range(33)]
    large = [base[start : start + elements - start % 5] for start, base in enumerate(bases)]
    small = [torch.randn(n, generator=generator).to(dtype)[n // 2 :] for n in (1, 2, 31, 65, 300)]
    tensors = [*large[:20], *small, *large[20:]]
    assert sum(x.nbytes for x in tensors) >= STREAMED_BYTES
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_or_not_is_the_same_to_the_bit(backend, dtype):
    params, dirs, first = (large_list(dtype, seed) for seed in range(3))
    saved, buffers = ([torch.zeros_like(x) for x in params] for _ in range(2))
    alone = [[x.clone() for x in tensors] for tensors in (params, saved, buffers)]

    rho = 300.0  # in bfloat16 eight million weights do not move by less
    norm = ops.perturb_(params, dirs, saved, rho=rho, mode="asam")
    for param, direction, keep in zip(alone[0], dirs, alone[1], strict=True):
        ops.perturb_([param], [direction], [keep], rho=rho, mode="asam", norm=norm)
    assert all(map(torch.equal, [*params, *saved], [*alone[0], *alone[1]]))

    options = {"lr": 0.1, "momentum": 0.9, "alpha": 0.7, "weight_decay": 1e-3}
    ops.sharp_step_(params, saved, dirs, buffers, first_grads=first, **options)
    for i, param in enumerate(alone[0]):
        lists = [[tensors[i]] for tensors in (alone[1], dirs, alone[2])]
        ops.sharp_step_([param], *lists, first_grads=[first[i]], **options)
    assert all(map(torch.equal, [*params, *buffers], [*alone[0], *alone[2]]))
