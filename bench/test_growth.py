"""Time against the size of the model, from a million to a billion parameters in bfloat16: a straight line?"""

import math

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


def slope(points: list[tuple[float, float]]) -> float:
    """The exponent e of time = c * size^e, by least squares on the logarithms."""
    logs = [(math.log(size), math.log(seconds)) for size, seconds in points]
    x, y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((a - x) * (b - y) for a, b in logs) / sum((a - x) ** 2 for a, _ in logs)


@pytest.mark.parametrize("way", ["neuron_norms", "TSBD step"])
def test_growth(compare, capsys, way):
    points = []
    for millions in MILLIONS if compare.timing else MILLIONS[:1]:
        xs, refs = model(millions, 0), model(millions, 1)
        buffers, saved = ([torch.zeros_like(x) for x in xs] for _ in range(2))

        def step(xs=xs, refs=refs, buffers=buffers, saved=saved):
            ops.perturb_(xs, refs, saved, rho=0.05, scope="tensor")
            ops.sharp_step_(xs, saved, refs, buffers, lr=1e-6, momentum=0.9, first_grads=refs, alpha=0.7)

        def norms(xs=xs, refs=refs):
            return ops.neuron_norms(xs, refs)

        call, bytes_each = (norms, 4) if way == "neuron_norms" else (step, 22)
        rows = compare(
            GROWTH,
            f"{way}, {millions} M",
            {OURS: call},
            moved=bytes_each * millions * 1_000_000,
            dtype=torch.bfloat16,
            rounds=5,
            gate=lambda ways: None,
        )
        if rows:
            points.append((millions, rows[OURS].p50))
    if points:
        with capsys.disabled():
            per_million = ", ".join(f"{millions} M {seconds / millions * 1e6:.0f} us" for millions, seconds in points)
            print(f"\n{way}: time ~ size^{slope(points):.3f}; per million parameters: {per_million}")
