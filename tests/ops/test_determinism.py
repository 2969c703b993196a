import math

import pytest
import torch

from bdfast import ops
from bdfast.testing import changed_like, neuron_mask, tensor_list


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["resnet18", "wide", "tall", "many"])
@pytest.mark.usefixtures("restored_threads")
def test_same_bits_whatever_the_thread_count(backend, name):
    if backend == "torch" and name in ("wide", "tall"):
        pytest.skip("torch.sum itself depends on the thread count")
    xs = tensor_list(name)
    refs = changed_like(xs)
    neurons = neuron_mask(xs)
    neurons[0] = True
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        params = [x.clone() for x in xs]
        tau = ops.kth_largest_change(xs, refs, neurons, 17)
        count = ops.zero_changed_(params, xs, refs, neurons, tau)
        ops.scale_neurons_(params, ops.neuron_norms(xs))
        norms = [ops.neuron_norms(xs, refs, ord=ord) for ord in (1, 2, math.inf)]
        steps = [ops.perturb_(params, refs, [x.clone() for x in xs], rho=0.5, mode=mode) for mode in ("sam", "path")]
        squared = ops.sharp_step_(params, xs, xs, lr=0.1, reference=refs)
        results.append([tau, count, squared, *norms, *steps, *params])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
