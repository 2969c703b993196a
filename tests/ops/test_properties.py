"""Random lists: what the public functions give must equal the reference on float64, or to the bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdfast import ops
from bdfast.ops import reference
from bdfast.testing import assert_matches

SHAPES = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=12,
)
CASES = {
    "shapes": SHAPES,
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "swapped": st.booleans(),
    "seed": st.integers(0, 2**32),
}
# The fixtures only choose a backend and the fill of fresh memory, so that examples may share them.
PROFILE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def random_lists(shapes, dtype, swapped, seed, count):
    generator = torch.Generator().manual_seed(seed)
    lists = [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(count)]
    if swapped:
        lists = [[x.transpose(0, -1) for x in xs] for xs in lists]
    rows = sum(x.shape[0] for x in lists[0])
    return *lists, torch.rand(rows, generator=generator)


@PROFILE
@given(**CASES, ord=st.sampled_from([1.0, 2.0, float("inf")]))
def test_norms(backend, shapes, dtype, swapped, seed, ord):
    xs, refs, _ = random_lists(shapes, dtype, swapped, seed, 2)
    truth = reference.neuron_norms([x.double() for x in xs], [x.double() for x in refs], ord)
    assert_matches(ops.neuron_norms(xs, refs, ord=ord), truth, baseline=reference.neuron_norms(xs, refs, ord))


@PROFILE
@given(**CASES, share=st.floats(0, 1))
def test_selection_and_zeroing(backend, shapes, dtype, swapped, seed, share):
    xs, refs, params, uniform = random_lists(shapes, dtype, swapped, seed, 3)
    neurons = uniform < 0.6
    total = sum(
        int(mask.sum()) * x[0].numel()
        for x, mask in zip(xs, neurons.split([len(x) for x in xs]), strict=True)
        if len(x)
    )
    q = max(1, round(share * total))
    if total == 0:
        with pytest.raises(ValueError, match="q: expected"):
            ops.kth_largest_change(xs, refs, neurons, q)
        tau = torch.tensor(0.5)
    else:
        tau = ops.kth_largest_change(xs, refs, neurons, q)
        assert torch.equal(tau, reference.kth_largest_change(xs, refs, neurons, q))
    expected = [x.clone() for x in params]
    count = reference.zero_changed_(expected, xs, refs, neurons, tau)
    assert torch.equal(ops.zero_changed_(params, xs, refs, neurons, tau), count)
    assert total == 0 or q <= count <= total
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


@PROFILE
@given(**CASES)
def test_scaling(backend, shapes, dtype, swapped, seed):
    params, scale = random_lists(shapes, dtype, swapped, seed, 1)
    expected = [x.clone() for x in params]
    reference.scale_neurons_(expected, scale)
    ops.scale_neurons_(params, scale)
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


@PROFILE
@given(**CASES, mode=st.sampled_from(["sam", "asam", "path"]), scope=st.sampled_from(["global", "tensor"]))
def test_perturbing(backend, shapes, dtype, swapped, seed, mode, scope):
    params, dirs, saved, _ = random_lists(shapes, dtype, swapped, seed, 3)
    before = [x.clone() for x in params]
    truth, plain = [x.double() for x in params], [x.clone() for x in params]
    arguments = (None, 0.5, mode, scope, 1e-12)
    norm = reference.perturb_(truth, [x.double() for x in dirs], [x.double() for x in saved], *arguments)
    plain_norm = reference.perturb_(plain, dirs, [x.clone() for x in saved], *arguments)
    assert_matches(ops.perturb_(params, dirs, saved, rho=0.5, mode=mode, scope=scope), norm, baseline=plain_norm)
    for param, start, keep, true, baseline in zip(params, before, saved, truth, plain, strict=True):
        assert torch.equal(keep, start)
        assert_matches(param, true, baseline=baseline, scale=start.double().abs() + 0.5)


@PROFILE
@given(**CASES, alpha=st.floats(0, 0.9), nesterov=st.booleans(), maximize=st.booleans())
def test_stepping(backend, shapes, dtype, swapped, seed, alpha, nesterov, maximize):
    *lists, _ = random_lists(shapes, dtype, swapped, seed, 6)
    options = (0.1, 0.9, 0.2, nesterov, 0.01, alpha, maximize)
    order = (0, 1, 2, 3, 4, 5)  # params, saved, grads, momentum_buffers, first_grads, references
    truth = [[x.double() for x in lists[i]] for i in order]
    plain = [[x.clone() for x in lists[i]] for i in order]
    squared = reference.sharp_step_(*truth, *options)
    plain_squared = reference.sharp_step_(*plain, *options)
    names = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "alpha", "maximize")
    params, saved, grads, buffers, first, references = lists
    actual = ops.sharp_step_(
        params,
        saved,
        grads,
        buffers,
        first_grads=first,
        reference=references,
        **dict(zip(names, options, strict=True)),
    )
    assert_matches(actual, squared, baseline=plain_squared)
    for written in (0, 3):
        for x, true, baseline in zip(lists[written], truth[written], plain[written], strict=True):
            assert_matches(x, true, baseline=baseline, scale=torch.full_like(true, 8.0))
