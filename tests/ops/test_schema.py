"""Schemas, fakes, version counters and torch.compile."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bdfast import ops
from bdfast.ops import backends, schema
from bdfast.testing import changed_like, neuron_mask, tensor_list


def sample_calls():
    xs = tensor_list("ragged")
    refs = changed_like(xs)
    params = tensor_list("ragged", seed=5)
    neurons = neuron_mask(xs)
    return {
        "neuron_norms": [(xs, refs, 1.0), (xs, [], 2.0), (xs, refs, math.inf)],
        "kth_largest_change": [(xs, refs, neurons, 100)],
        "zero_changed_": [(params, xs, refs, neurons, torch.tensor(0.1))],
        "scale_neurons_": [(params, torch.rand(len(neurons)))],
        "perturb_": [
            (params, xs, changed_like(xs), None, 0.5, "asam", "global", 1e-12),
            (params, xs, changed_like(xs), torch.ones(len(xs)), 0.5, "path", "tensor", 1e-12),
        ],
        "sharp_step_": [
            (params, xs, refs, [], [], [], 0.1, 0.0, 0.0, False, 0.0, 1.0, False),
            (params, xs, refs, changed_like(xs), refs, refs, 0.1, 0.9, 0.1, True, 0.1, 0.7, True),
        ],
    }


@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_opcheck(backend, op):
    for args in sample_calls()[op]:
        torch.library.opcheck(getattr(torch.ops.bdfast, op).default, args)


@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_native_ops_stay_callable_on_their_own(op):
    if not backends.backends()["cpu"].available:
        pytest.skip(backends.backends()["cpu"].reason)
    for args in sample_calls()[op]:
        torch.library.opcheck(getattr(torch.ops.bdfast_cpu, op).default, args)


@pytest.mark.parametrize("op", schema.SCHEMAS)
def test_fakes_agree_with_what_comes_out(backend, op):
    for args in sample_calls()[op]:
        real = getattr(torch.ops.bdfast, op)(*args)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake_args = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
            fake = getattr(torch.ops.bdfast, op)(*fake_args)
        if real is None:
            assert fake is None
        else:
            assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


def test_public_functions_take_fake_tensors_of_any_size():
    with FakeTensorMode():
        weights = [torch.empty(2**31 + 5, 3), torch.empty(4, 2**33)]
        assert ops.neuron_norms(weights, weights).shape == (2**31 + 9,)
        ops.scale_neurons_(weights, torch.empty(2**31 + 9))


def norms(model, reference):
    return ops.neuron_norms(model, reference, ord=2)


def reinitialise(params, xs, refs, neurons):
    tau = ops.kth_largest_change(xs, refs, neurons, 100)
    return tau, ops.zero_changed_(params, xs, refs, neurons, tau)


def damp(params, scale):
    ops.scale_neurons_(params, scale)
    return [param * 2 for param in params]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks(backend, compiler):
    # Every backend is opaque to the compiler, and C++ takes its time.
    if compiler == "inductor" and backend != "cpu":
        pytest.skip("inductor is tested with the cpu backend")
    torch._dynamo.reset()

    def everything(params, xs, refs, neurons, scale):
        return norms(xs, refs), reinitialise(params, xs, refs, neurons), damp(params, scale)

    xs = tensor_list("ragged")[2:5] + tensor_list("transposed")[:2]
    refs = changed_like(xs)
    neurons = neuron_mask(xs)
    scale = torch.rand(len(neurons), generator=torch.Generator().manual_seed(0))
    eager, compiled = ([x.clone() for x in xs] for _ in range(2))
    expected = everything(eager, xs, refs, neurons, scale)
    actual = torch.compile(everything, fullgraph=True, backend=compiler)(compiled, xs, refs, neurons, scale)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    assert all(x._version > 0 for x in compiled)


def test_compiled_mutation_is_seen_through_an_alias(backend):
    torch._dynamo.reset()

    def zero_all(params, neurons):
        before = [param + 0 for param in params]
        ops.zero_changed_(params, params, [torch.zeros_like(param) for param in params], neurons, 0.0)
        return before

    params = [torch.ones(2, 3), torch.ones(4)]
    before = torch.compile(zero_all, fullgraph=True, backend="aot_eager")(params, torch.ones(6, dtype=torch.bool))
    assert all(bool(x.all()) for x in before)
    assert not any(bool(x.any()) for x in params)


def test_in_place_ops_count_versions(backend):
    params = tensor_list("ragged") + tensor_list("transposed")
    neurons = neuron_mask(params)
    before = [x._version for x in params]
    ops.scale_neurons_(params, torch.ones(len(neurons)))
    assert all(x._version > version for x, version in zip(params, before, strict=True))
    before = [x._version for x in params]
    ops.zero_changed_(params, params, params, neurons, 1.0)
    assert all(x._version > version for x, version in zip(params, before, strict=True))


def test_a_stale_graph_is_noticed(backend):
    weight = torch.ones(2, 3, requires_grad=True)
    loss = (weight**2).sum()
    ops.scale_neurons_([weight], torch.zeros(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode(backend):
    with torch.inference_mode():
        params = [torch.ones(2, 3)]
        ops.scale_neurons_(params, torch.tensor([0.0, 2.0]))
        assert params[0].sum() == 6


def test_copy_on_write_memory_is_not_written_through(backend):
    original = torch.ones(2, 3)
    lazy = torch._lazy_clone(original)
    ops.scale_neurons_([lazy], torch.zeros(2))
    assert original.all()
    assert not lazy.any()
