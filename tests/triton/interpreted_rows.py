"""Run by test_interpreted.py, with TRITON_INTERPRET=1: the ops on rows.

Casts to bfloat16 are cut off there instead of rounded, which the error budget has room for.
"""

import math

import pytest
import torch
from scenes import CASES, DTYPES, around, copies, like, same_bits, scene, wide

from bdfast.kernels import KERNELS
from bdfast.ops import reference
from bdfast.testing import assert_matches, changed_like, neuron_mask

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("with_refs", [True, False])
@pytest.mark.parametrize("ord", [1, 2, math.inf])
@pytest.mark.parametrize(("name", "dtype"), [*CASES, ("tall", torch.float32)])
def test_neuron_norms(name, dtype, ord, with_refs):
    if (not with_refs and name not in ("odd", "no_columns")) or (name in ("resnet18", "tall") and ord != 2):
        return
    xs = scene(name, dtype)
    refs = like(xs) if with_refs else []
    actual = KERNELS["neuron_norms"](xs, refs, ord)
    assert actual.dtype == torch.float32
    truth = reference.neuron_norms(wide(xs), wide(refs), ord)
    assert_matches(actual, truth, baseline=reference.neuron_norms(xs, refs, ord))
    assert same_bits([actual], [KERNELS["neuron_norms"](copies(xs), copies(refs), ord)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("ord", [1, 2, math.inf])
def test_non_finite_values_stay_in_their_row(ord, value):
    for columns in (3, 100, 20_000):
        xs = [torch.ones(3, columns), torch.ones(2, columns)]
        xs[0][1, columns // 2] = value
        norms = KERNELS["neuron_norms"](xs, [], ord)
        expected = columns if ord == 1 else columns**0.5 if ord == 2 else 1
        assert norms[[0, 2, 3, 4]].tolist() == pytest.approx([expected] * 4)
        assert not norms[1].isfinite()
        assert norms[1].isnan() == math.isnan(value)


def test_a_sum_over_a_long_row_loses_little():
    xs = [torch.full((1, 10**6), 0.1)]
    assert_matches(KERNELS["neuron_norms"](xs, [], 1), xs[0].double().sum(1))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_kth_largest_change(name, dtype):
    xs = scene(name, dtype)
    refs = like(xs)
    neurons = neuron_mask(xs)
    neurons[-1] = True
    masks = neurons.split([x.shape[0] for x in xs])
    size = sum(int(mask.sum()) * math.prod(x.shape[1:]) for x, mask in zip(xs, masks, strict=True))
    for q in (1, size // 3 + 1, size) if name != "resnet18" else (size // 3,):
        tau = KERNELS["kth_largest_change"](xs, refs, neurons, q)
        assert tau.shape == ()
        assert torch.equal(tau, reference.kth_largest_change(xs, refs, neurons, q)), q
    assert KERNELS["kth_largest_change"](xs, refs, neurons, size + 1).isnan()


def test_every_rank_with_ties_zeros_extremes_and_nan():
    values = [0.0, -0.0, 1e-45, 1e-38, 0.5, 0.5, -0.5, 1.0, -3e38, math.inf, -math.inf, math.nan, -math.nan]
    x = torch.tensor(values)
    ordered = x.abs().sort(descending=True).values
    everything = torch.ones(len(values), dtype=torch.bool)
    for q in range(1, len(values) + 1):
        tau = KERNELS["kth_largest_change"]([x], [torch.zeros_like(x)], everything, q)
        torch.testing.assert_close(tau, ordered[q - 1], rtol=0, atol=0, equal_nan=True)


def test_nothing_selected_has_no_largest_change():
    xs = [torch.ones(2, 2)]
    assert KERNELS["kth_largest_change"](xs, xs, torch.zeros(2, dtype=torch.bool), 1).isnan()
    empty = scene("empty_all")
    assert KERNELS["kth_largest_change"](empty, empty, torch.zeros(0, dtype=torch.bool), 1).isnan()


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [*CASES, ("empty_all", torch.float32)])
def test_zero_changed(name, dtype, alias):
    xs = scene(name, dtype)
    refs = like(xs)
    params = xs if alias else like(xs, seed=5)
    expected, neurons, tau = copies(params), neuron_mask(xs), torch.tensor(0.07)
    count = reference.zero_changed_(expected, xs, refs, neurons, tau)
    actual = KERNELS["zero_changed_"](params, xs, refs, neurons, tau)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, count)
    assert same_bits(params, expected)
    assert all(around(x).isnan().all() for x in params if x._base is not None)


def test_zeroing_of_nan_and_of_bits_that_stay():
    xs = [torch.tensor([1.0, math.nan, math.inf, 0.0, 5.0])]
    everything = torch.ones(5, dtype=torch.bool)
    for tau, expected in ((1.0, [0, 1, 0, 1, 0]), (0.0, [0, 1, 0, 0, 0]), (math.nan, [1, 0, 1, 1, 1])):
        params = [torch.ones(5)]
        count = KERNELS["zero_changed_"](params, xs, [torch.zeros(5)], everything, torch.tensor(tau))
        assert params[0].tolist() == expected
        assert count.item() == expected.count(0)
    for dtype in DTYPES:
        params = [torch.tensor([math.nan, -math.nan, -0.0, math.inf, 1e-8]).to(dtype)]
        before, zeros = copies(params), [torch.zeros(5, dtype=dtype)]
        KERNELS["zero_changed_"](params, zeros, zeros, everything, torch.tensor(1.0))
        assert same_bits(params, before)


@pytest.mark.parametrize(("name", "dtype"), [*CASES, ("empty_all", torch.float32)])
def test_scale_neurons(name, dtype):
    params = like(scene(name, dtype), seed=5)
    rows = sum(x.shape[0] for x in params)
    scale = torch.randn(rows, generator=torch.Generator().manual_seed(3))
    scale[::3] = 1.0
    truth, plain, before = wide(params), copies(params), copies(params)
    reference.scale_neurons_(truth, scale.double())
    reference.scale_neurons_(plain, scale)
    KERNELS["scale_neurons_"](params, scale)
    for i, param in enumerate(params):
        assert_matches(param, truth[i], baseline=plain[i])
        assert param._base is None or around(param).isnan().all()
    firsts = torch.tensor([0, *[x.shape[0] for x in params]]).cumsum(0).tolist()
    for first, param, start in zip(firsts, params, before, strict=False):
        stay = (torch.arange(first, first + len(param)) % 3 == 0).nonzero().flatten()
        assert same_bits([param[stay]], [start[stay]])


def test_one_row_of_a_million_columns():
    xs = [torch.randn(1, 10**6, generator=torch.Generator().manual_seed(0))]
    refs, neurons = changed_like(xs), torch.ones(1, dtype=torch.bool)
    norms = KERNELS["neuron_norms"](xs, refs, 2)
    assert_matches(norms, reference.neuron_norms(wide(xs), wide(refs), 2))
    tau = KERNELS["kth_largest_change"](xs, refs, neurons, 700_000)
    assert torch.equal(tau, reference.kth_largest_change(xs, refs, neurons, 700_000))
    params = copies(xs)
    assert KERNELS["zero_changed_"](params, xs, refs, neurons, tau).item() >= 700_000
    expected = copies(xs)
    reference.zero_changed_(expected, xs, refs, neurons, tau)
    assert same_bits(params, expected)
    norm = KERNELS["perturb_"](params, refs, copies(xs), None, 0.5, "sam", "global", 1e-12)
    assert_matches(norm, refs[0].double().norm())
