"""What a call costs before it has done anything: 62 tensors of one number each."""

import pytest
import torch

from bdfast import ops
from bench.compare import OURS

TENSORS = 62
CALLS = 2000
OVERHEAD = "a call on 62 tiny tensors"


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
def test_overhead(compare, op):
    call = calls()[op]
    compare(OVERHEAD, op, {OURS: call}, moved=0, rounds=CALLS, gate=lambda ways: None)
