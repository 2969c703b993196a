"""Mistakes that multi-tensor engines have made, by the issue in which they were reported."""

import math

import pytest
import torch

from bdfast import ops

SIZES = [(3, 4), (0, 4), (0,), (2, 1), (0, 2, 2), (1, 50), (0, 9)]


def lists(sizes):
    """Row r consists of r + 1, so that a row which lands in another place is seen."""
    rows = iter(range(1, 100))
    return [
        torch.stack([torch.full(size[1:], float(next(rows))) for _ in range(size[0])]) if size[0] else torch.ones(size)
        for size in sizes
    ]


def expected_sums(xs):
    return [float(row.sum()) for x in xs for row in x]


@pytest.mark.parametrize("where", range(len(SIZES)))
def test_pytorch_94865_empty_tensors_leave_the_others_alone(backend, where):
    xs = lists(SIZES[where:] + SIZES[:where])
    assert ops.neuron_norms(xs).tolist() == expected_sums(xs)


def test_pytorch_100701_last_tensor_is_empty(backend):
    params = [torch.ones(2, 3), torch.ones(4), torch.ones(0, 7)]
    ops.scale_neurons_(params, torch.full((6,), 3.0))
    assert [float(x.sum()) for x in params] == [18, 12, 0]


def test_pytorch_140066_results_belong_to_their_rows_behind_empty_tensors(backend):
    xs = lists([(0, 3), (1, 2), (0, 3), (0, 1), (2, 5), (0, 3), (1, 1)])
    assert ops.neuron_norms(xs).tolist() == [2, 10, 15, 4]
    neurons = torch.tensor([False, False, True, False])
    assert ops.zero_changed_(xs, xs, [torch.zeros_like(x) for x in xs], neurons, 0.0).item() == 5
    assert ops.neuron_norms(xs).tolist() == [2, 10, 0, 4]


def test_transformer_engine_3207_no_tensor_of_many_is_skipped(backend):
    for count in (109, 110, 111, 129, 320, 700):
        params = [torch.ones(1, 1 + i % 3) if i % 7 else torch.ones(0, 2) for i in range(count)]
        rows = sum(len(x) for x in params)
        ops.scale_neurons_(params, torch.arange(1.0, rows + 1))
        assert torch.cat([x[:, 0] for x in params]).tolist() == list(range(1, rows + 1))


def test_no_tensor_is_skipped_or_met_twice_by_the_steps(backend):
    for sizes in (
        [(2, 3), (0, 3), (4,), (0,)],
        [(0, 5), (1, 50_000), (3, 1)],
        [(1 + i % 3, 1 + i % 5) for i in range(700)],
    ):
        params = [torch.full(size, 10.0) for size in sizes]
        ones, saved = [torch.ones(size) for size in sizes], [torch.zeros(size) for size in sizes]
        norms = ops.perturb_(params, ones, saved, rho=1.0, scope="tensor")
        assert norms.tolist() == pytest.approx([x.numel() ** 0.5 for x in ones])
        assert all(bool((x == 10).all()) for x in saved)
        ops.sharp_step_(params, saved, ones, lr=1.0)
        assert all(bool((x == 9).all()) for x in params)


def test_apex_memory_formats_are_not_mixed():
    x = torch.randn(4, 3, 2, 2)
    with pytest.raises(ValueError, match=r"refs\[0\]: expected strides .*memory format"):
        ops.neuron_norms([x], [x.to(memory_format=torch.channels_last)])


def test_apex_max_norm_keeps_nan(backend):
    for columns in (5, 64, 100_000):
        x = torch.zeros(2, columns)
        x[1, -1], x[1, 0] = math.nan, math.inf
        assert ops.neuron_norms([x], ord=math.inf).isnan().tolist() == [False, True]


def test_apex_unaligned_starts(backend):
    for dtype in (torch.float32, torch.bfloat16):
        memory = torch.ones(1000, dtype=dtype)
        for start in range(9):
            x = memory[start : start + 300].view(3, 100)
            assert ops.neuron_norms([x], [torch.zeros(3, 100, dtype=dtype)]).tolist() == [100] * 3
            ops.scale_neurons_([x], torch.ones(3))
            ops.sharp_step_([x], [x], [torch.zeros(3, 100, dtype=dtype)], lr=1.0)
            assert bool((memory == 1).all())
    outside = torch.ones(50)
    ops.scale_neurons_([outside[3:43].view(4, 10)], torch.zeros(4))
    assert outside.nonzero().flatten().tolist() == [0, 1, 2, *range(43, 50)]
    inside, saved = outside[3:43].view(4, 10), torch.full((50,), 7.0)
    ops.perturb_([inside], [torch.ones(4, 10)], [saved[5:45].view(4, 10)], rho=1.0)
    assert (saved != 7).nonzero().flatten().tolist() == list(range(5, 45))
    assert outside[:3].tolist() + outside[43:].tolist() == [1.0] * 10


def test_one_giant_among_small_ones(backend):
    xs = [torch.ones(3), torch.ones(2, 300_000), torch.ones(5, 2)]
    assert ops.neuron_norms(xs).tolist() == [1] * 3 + [300_000] * 2 + [2] * 5
    neurons = torch.tensor([False] * 3 + [False, True] + [True] * 5)
    zeros = [torch.zeros_like(x) for x in xs]
    assert ops.zero_changed_(xs, xs, zeros, neurons, 1.0).item() == 300_010
    assert ops.neuron_norms(xs).tolist() == [1] * 3 + [300_000, 0] + [0] * 5


def test_mixed_devices_are_refused():
    with pytest.raises(ValueError, match=r"refs\[1\]: expected device cpu like xs\[0\], got meta"):
        ops.neuron_norms([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.ones(2, device="meta")])
