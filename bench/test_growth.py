"""Time against the size of the model, from a million to a billion parameters in bfloat16: a straight line?"""

import pytest
import torch

from bdfast import ops
from bench import lists
from bench.compare import OURS
from bench.show import GROWTH

MILLIONS = (1, 3, 10, 30, 100, 300, 1000)
WIDTH = 1000


def model(millions: int, seed: int) -> list[torch.Tensor]:
    """Layers of at most 16 M parameters, as large models have."""
    layers = -(-millions // 16)
    return lists.random_tensors([(millions * 1_000_000 // layers // WIDTH, WIDTH)] * layers, seed, dtype=torch.bfloat16)


@pytest.mark.parametrize("way", ["neuron_norms", "TSBD step"])
def test_growth(compare, way):
    for millions in MILLIONS if compare.timing else MILLIONS[:1]:
        xs, refs = model(millions, 0), model(millions, 1)
        buffers, saved = ([torch.zeros_like(x) for x in xs] for _ in range(2))

        def step(xs=xs, refs=refs, buffers=buffers, saved=saved):
            ops.perturb_(xs, refs, saved, rho=0.05, scope="tensor")
            ops.sharp_step_(xs, saved, refs, buffers, lr=1e-6, momentum=0.9, first_grads=refs, alpha=0.7)

        def norms(xs=xs, refs=refs):
            return ops.neuron_norms(xs, refs)

        call, bytes_each = (norms, 4) if way == "neuron_norms" else (step, 22)
        compare(
            GROWTH,
            f"{way}, {millions} M",
            {OURS: call},
            moved=bytes_each * millions * 1_000_000,
            dtype=torch.bfloat16,
            rounds=5,
            gate=lambda ways: None,
        )
