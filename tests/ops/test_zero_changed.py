import math

import pytest
import torch

from bdfast import ops
from bdfast.testing import SHAPES, changed_like, neuron_mask, tensor_list

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def expected_params(params, xs, refs, neurons, tau):
    """Row by row, and the number of sub-weights that were selected."""
    masks = neurons.split([x.shape[0] for x in xs])
    results, count = [], 0
    for param, x, ref, mask in zip(params, xs, refs, masks, strict=True):
        result = param.clone()
        for row in range(len(x)):
            if mask[row]:
                chosen = (x[row].float() - ref[row].float()).abs() >= tau
                result[row] = torch.where(chosen, torch.zeros_like(result[row]), result[row])
                count += int(chosen.sum())
        results.append(result)
    return results, count


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"tall", "wide"}))
def test_equals_a_plain_loop(backend, name):
    for dtype in DTYPES:
        xs = tensor_list(name, dtype=dtype)
        refs = changed_like(xs)
        params = tensor_list(name, dtype=dtype, seed=5)
        neurons = neuron_mask(xs)
        tau = torch.tensor(0.07)
        expected, count = expected_params(params, xs, refs, neurons, tau)
        selected = ops.zero_changed_(params, xs, refs, neurons, tau)
        assert selected.dtype == torch.int64
        assert selected.item() == count
        exactly(params, expected)


@pytest.mark.parametrize("name", ["tall", "wide"])
def test_large_lists(backend, name):
    xs = tensor_list(name)
    refs = changed_like(xs)
    params = [x.clone() for x in xs]
    chosen = (xs[0] - refs[0]).abs() >= 0.1
    count = ops.zero_changed_(params, xs, refs, torch.ones(xs[0].shape[0], dtype=torch.bool), 0.1)
    assert count == chosen.sum()
    exactly(params[0], xs[0].masked_fill(chosen, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_together_with_the_threshold_it_zeroes_q_and_ties(backend, dtype):
    xs = tensor_list("resnet18", dtype=dtype)
    refs = changed_like(xs)
    neurons = neuron_mask(xs)
    masks = neurons.split([x.shape[0] for x in xs])
    total = sum(int(mask.sum()) * x[0].numel() for x, mask in zip(xs, masks, strict=True))
    q = int(0.7 * total)
    tau = ops.kth_largest_change(xs, refs, neurons, q)
    above = sum(
        int(((x.float() - ref.float()).abs() > tau)[mask].sum()) for x, ref, mask in zip(xs, refs, masks, strict=True)
    )
    assert above < q <= ops.zero_changed_([x.clone() for x in xs], xs, refs, neurons, tau).item()


def test_ties_are_zeroed(backend):
    params = [torch.ones(4)]
    count = ops.zero_changed_(
        params, [torch.tensor([1.0, 2.0, 2.0, 3.0])], [torch.zeros(4)], torch.ones(4, dtype=torch.bool), 2.0
    )
    assert count.item() == 3
    assert params[0].tolist() == [1, 0, 0, 0]


def test_nan_changes(backend):
    xs = [torch.tensor([1.0, math.nan, math.inf, 0.0, 5.0])]
    refs = [torch.zeros(5)]
    everything = torch.ones(5, dtype=torch.bool)
    for tau, expected in ((1.0, [0, 1, 0, 1, 0]), (0.0, [0, 1, 0, 0, 0]), (math.nan, [1, 0, 1, 1, 1])):
        params = [torch.ones(5)]
        count = ops.zero_changed_(params, xs, refs, everything, tau)
        assert params[0].tolist() == expected
        assert count.item() == expected.count(0)


def test_values_that_stay_keep_their_bits(backend):
    for dtype, integer in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)):
        params = [torch.tensor([math.nan, -math.nan, -0.0, math.inf, 1e-8, 7.0]).to(dtype)]
        before = params[0].view(integer).clone()
        zeros = [torch.zeros(6, dtype=dtype)]
        ops.zero_changed_(params, zeros, zeros, torch.ones(6, dtype=torch.bool), 1.0)
        assert torch.equal(params[0].view(integer), before)


def test_zero_is_positive(backend):
    params = [torch.tensor([-1.0])]
    ops.zero_changed_(params, [torch.ones(1)], [torch.zeros(1)], torch.tensor([True]), 1.0)
    assert math.copysign(1, params[0].item()) == 1


@pytest.mark.parametrize("alias", ["xs", "refs"])
def test_params_may_be_one_of_the_compared_lists(backend, alias):
    xs = tensor_list("ragged")
    refs = changed_like(xs)
    neurons = neuron_mask(xs)
    params = xs if alias == "xs" else refs
    expected, count = expected_params(params, xs, refs, neurons, 0.1)
    assert ops.zero_changed_(params, xs, refs, neurons, 0.1).item() == count
    exactly(params, expected)


def test_tau_rounded_from_float64_still_finds_its_change():
    generator = torch.Generator().manual_seed(0)
    xs = [torch.rand(1, 101, dtype=torch.float64, generator=generator)]
    refs = [torch.zeros(1, 101, dtype=torch.float64)]
    neuron = torch.tensor([True])
    for q in range(1, 102):
        tau = ops.kth_largest_change(xs, refs, neuron, q)
        assert ops.zero_changed_([xs[0].clone()], xs, refs, neuron, tau).item() == q


def test_parameters_that_require_grad(backend):
    layer = torch.nn.Linear(4, 3)
    ops.zero_changed_([layer.weight], [layer.weight], [layer.weight + 1], torch.ones(3, dtype=torch.bool), 0.5)
    assert not layer.weight.any()
    assert layer.weight.requires_grad


def test_empty_list():
    assert ops.zero_changed_([], [], [], torch.zeros(0, dtype=torch.bool), 1.0).item() == 0


def test_wrong_use_changes_nothing(backend):
    params = [torch.ones(2, 2), torch.ones(3)]
    xs = [torch.full((2, 2), 9.0), torch.full((3,), 9.0)]
    refs = [torch.zeros(2, 2), torch.zeros(4)]
    with pytest.raises(ValueError, match=r"refs\[1\]: expected shape \[3\] like params\[1\], got \[4\]"):
        ops.zero_changed_(params, xs, refs, torch.ones(5, dtype=torch.bool), 1.0)
    assert all(bool((param == 1).all()) for param in params)


@pytest.mark.parametrize(
    ("tau", "error", "message"),
    [
        (torch.ones(2), ValueError, r"tau: expected shape \[\], got \[2\]"),
        (torch.ones((), dtype=torch.float64), TypeError, r"tau: expected dtype torch.float32, got torch.float64"),
        (torch.ones((), device="meta"), ValueError, r"tau: expected device cpu like params, got meta"),
    ],
)
def test_wrong_tau(tau, error, message):
    xs = [torch.ones(1)]
    with pytest.raises(error, match=message):
        ops.zero_changed_(xs, xs, xs, torch.tensor([True]), tau)
