import math

import pytest
import torch

from bdfast import ops
from bdfast.ops import reference
from bdfast.testing import SHAPES, changed_like, neuron_mask, tensor_list

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pool_of(xs, refs, neurons):
    """Every change of the selected rows, one by one."""
    rows = [row for x in xs for row in x]
    ref_rows = [row for ref in refs for row in ref]
    changes = [
        (row.float() - ref.float()).abs().flatten()
        for row, ref, chosen in zip(rows, ref_rows, neurons.tolist(), strict=True)
        if chosen
    ]
    return torch.cat([torch.zeros(0), *changes])


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"empty_all", "wide", "tall"}))
def test_is_the_element_that_a_full_sort_finds(backend, name):
    for dtype in DTYPES:
        xs = tensor_list(name, dtype=dtype)
        refs = changed_like(xs)
        neurons = neuron_mask(xs)
        neurons[-1] = True
        ordered = pool_of(xs, refs, neurons).sort(descending=True).values
        for q in {1, 2, len(ordered) // 3, int(0.7 * len(ordered)), len(ordered) - 1, len(ordered)} - {0}:
            if q <= len(ordered):
                tau = ops.kth_largest_change(xs, refs, neurons, q)
                assert tau.shape == ()
                assert torch.equal(tau, ordered[q - 1]), (dtype, q)


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_large_lists(backend, name):
    xs = tensor_list(name)
    refs = changed_like(xs)
    neurons = torch.ones(xs[0].shape[0], dtype=torch.bool)
    expected = (xs[0] - refs[0]).abs().flatten().sort(descending=True).values[700_000 % xs[0].numel()]
    assert torch.equal(ops.kth_largest_change(xs, refs, neurons, 700_000 % xs[0].numel() + 1), expected)


def hard_pools():
    """Large enough to be sampled, and unlike their samples or without a short range around the answer."""
    generator = torch.Generator().manual_seed(0)
    size = 300_000
    smooth = torch.rand(size, generator=generator)
    return {
        "equal": torch.ones(size),
        "two values": (smooth < 0.5).float() + 1,
        "few values": (smooth * 7).floor(),
        "seldom seen": torch.where(torch.arange(size) % 18 == 0, 0.0, smooth),
        "only seen": torch.where(torch.arange(size) % 18 == 0, smooth, 0.0),
        "mostly nan": torch.where(smooth < 0.7, math.nan, smooth),
        "sorted": smooth.sort().values,
    }


@pytest.mark.parametrize("name", hard_pools())
def test_hard_pools(backend, name):
    x = hard_pools()[name]
    ordered = x.sort(descending=True).values
    for q in (1, 2, 1000, 16_384, 150_000, 210_000, 299_999, 300_000):
        tau = ops.kth_largest_change([x], [torch.zeros_like(x)], torch.ones(len(x), dtype=torch.bool), q)
        torch.testing.assert_close(tau, ordered[q - 1], rtol=0, atol=0, equal_nan=True)


def test_every_rank_with_ties_zeros_and_extremes(backend):
    values = [0.0, -0.0, 1e-45, 1e-38, 0.5, 0.5, -0.5, 1.0, -3e38, math.inf, -math.inf]
    xs = [torch.tensor(values)]
    refs = [torch.zeros(len(values))]
    everything = torch.ones(len(values), dtype=torch.bool)
    found = [ops.kth_largest_change(xs, refs, everything, q).item() for q in range(1, len(values) + 1)]
    assert found == sorted((abs(torch.tensor(v).item()) for v in values), reverse=True)


def test_nan_counts_as_the_largest(backend):
    xs = [torch.tensor([1.0, math.nan, math.inf, -math.nan])]
    refs = [torch.zeros(4)]
    everything = torch.ones(4, dtype=torch.bool)
    found = [ops.kth_largest_change(xs, refs, everything, q).item() for q in (1, 2, 3, 4)]
    assert math.isnan(found[0])
    assert math.isnan(found[1])
    assert found[2:] == [math.inf, 1.0]


def test_unselected_rows_do_not_count(backend):
    xs = [torch.tensor([[9.0, 9.0], [1.0, 2.0]]), torch.tensor([7.0])]
    refs = [torch.zeros(2, 2), torch.zeros(1)]
    neurons = torch.tensor([False, True, False])
    assert ops.kth_largest_change(xs, refs, neurons, 1).item() == 2
    assert ops.kth_largest_change(xs, refs, neurons, 2).item() == 1


def test_mask_with_strides(backend):
    xs = [torch.tensor([1.0, 2.0, 3.0])]
    mask = torch.tensor([True, False, False, True, False, True])[::2]
    assert ops.kth_largest_change(xs, [torch.zeros(3)], mask, 1).item() == 1


@pytest.mark.parametrize("q", [0, -1, 5, 2**40])
def test_q_out_of_range(backend, q):
    xs = [torch.ones(2, 2), torch.ones(3, 7)]
    neurons = torch.tensor([True, True, False, False, False])
    with pytest.raises(ValueError, match=r"kth_largest_change: q: expected .*, got -?\d+; .*select"):
        ops.kth_largest_change(xs, xs, neurons, q)


def test_nothing_selected(backend):
    xs = [torch.ones(2, 2)]
    with pytest.raises(ValueError, match=r"q: expected .*, got 1;"):
        ops.kth_largest_change(xs, xs, torch.zeros(2, dtype=torch.bool), 1)
    with pytest.raises(ValueError, match=r"q: expected .*, got 1;"):
        ops.kth_largest_change([], [], torch.zeros(0, dtype=torch.bool), 1)
    with pytest.raises(ValueError, match=r"q: expected .*, got 1;"):
        ops.kth_largest_change([torch.ones(0, 3)], [torch.ones(0, 3)], torch.zeros(0, dtype=torch.bool), 1)


@pytest.mark.parametrize("q", [True, 1.0, torch.tensor(1)])
def test_q_is_an_int(q):
    xs = [torch.ones(2, 2)]
    with pytest.raises(TypeError, match=r"q: expected an int, got a \w+;"):
        ops.kth_largest_change(xs, xs, torch.ones(2, dtype=torch.bool), q)


def test_reference_in_float64_keeps_its_precision():
    xs = [torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)]
    refs = [torch.ones(2, dtype=torch.float64)]
    everything = torch.ones(2, dtype=torch.bool)
    assert reference.kth_largest_change(xs, refs, everything, 1).item() == pytest.approx(1e-12, rel=1e-3)
    assert ops.kth_largest_change(xs, refs, everything, 1).dtype == torch.float32
