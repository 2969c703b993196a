"""What a call costs before it has done anything: 62 tensors of one number each."""

import pytest
import torch

from bdfast import ops
from bench.compare import OURS, interleaved, rows_of

TENSORS = 62
CALLS = 200


def calls() -> dict[str, object]:
    xs, refs, saved, buffers = ([torch.full((1,), float(i)) for _ in range(TENSORS)] for i in range(4))
    neurons = torch.ones(TENSORS, dtype=torch.bool)
    scale, tau = torch.ones(TENSORS), torch.tensor(9.0)
    return {
        "neuron_norms": lambda: ops.neuron_norms(xs, refs),
        "kth_largest_change": lambda: ops.kth_largest_change(xs, refs, neurons, 3),
        "zero_changed_": lambda: ops.zero_changed_(xs, xs, refs, neurons, tau),
        "scale_neurons_": lambda: ops.scale_neurons_(xs, scale),
        "perturb_": lambda: ops.perturb_(xs, refs, saved, rho=0.0),
        "sharp_step_": lambda: ops.sharp_step_(xs, saved, refs, buffers, lr=0.0, momentum=0.9),
    }


@pytest.mark.parametrize("op", calls())
def test_overhead(benchmark, capsys, op):
    call = calls()[op]

    def many() -> None:
        for _ in range(CALLS):
            call()

    many()
    if benchmark.disabled:
        benchmark(call)
        return
    times = interleaved({OURS: many}, 15)
    row = rows_of(op, f"{TENSORS} tensors of one number", torch.float32, times, 1)[0]
    benchmark.pedantic(call, rounds=3)
    with capsys.disabled():
        print(f"\n{op}, {TENSORS} tensors of one number: {row.p50 / CALLS * 1e6:.1f} us a call")
