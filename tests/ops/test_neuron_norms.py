import math

import pytest
import torch

from bdfast import ops
from bdfast.ops import reference
from bdfast.testing import SHAPES, assert_matches, changed_like, tensor_list

ORDS = (1, 2, math.inf)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def doubles(xs):
    return [x.double() for x in xs]


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("with_refs", [True, False])
def test_matches_float64(backend, name, ord, with_refs):
    for dtype in DTYPES:
        xs = tensor_list(name, dtype=dtype)
        refs = changed_like(xs) if with_refs else []
        actual = ops.neuron_norms(xs, refs if with_refs else None, ord=ord)
        truth = reference.neuron_norms(doubles(xs), doubles(refs), ord)
        assert actual.dtype == torch.float32
        assert_matches(actual, truth, baseline=reference.neuron_norms(xs, refs, ord))


def test_reference_matches_a_plain_loop():
    xs = [torch.tensor([[1.0, -2.0], [3.0, 4.0]]).double(), torch.tensor([-5.0]).double()]
    refs = [torch.tensor([[0.0, 2.0], [3.0, 1.0]]).double(), torch.tensor([1.0]).double()]
    assert reference.neuron_norms(xs, refs, 1).tolist() == [5.0, 3.0, 6.0]
    assert reference.neuron_norms(xs, refs, 2).tolist() == [math.sqrt(17.0), 3.0, 6.0]
    assert reference.neuron_norms(xs, [], math.inf).tolist() == [2.0, 4.0, 5.0]


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_stay_in_their_row(backend, ord, value):
    for columns in (3, 100, 70_000):
        xs = [torch.ones(3, columns), torch.ones(2, columns)]
        clean = ops.neuron_norms(xs, ord=ord)
        xs[0][1, columns // 2] = value
        norms = ops.neuron_norms(xs, ord=ord)
        assert torch.equal(norms[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])
        assert not norms[1].isfinite()
        assert norms[1].isnan() == math.isnan(value)


def test_a_row_longer_than_a_piece_is_summed_completely(backend):
    # 32768 elements are one piece of work in the native code; the lengths lie around multiples of it.
    for columns in (32767, 32768, 32769, 98304, 100_001):
        xs = [torch.ones(2, columns), torch.ones(3, 5)]
        assert ops.neuron_norms(xs).tolist() == [columns, columns, 5, 5, 5]


def test_long_sums_lose_little(backend):
    x = torch.full((1, 10**7), 0.1)
    assert_matches(ops.neuron_norms([x]), x.double().sum(1))


def test_subnormal_and_extreme_halves():
    values = torch.tensor([6e-8, 6.1e-5, 65504.0, -65504.0, 0.0, -0.0], dtype=torch.float16)
    assert torch.equal(ops.neuron_norms([values]), values.float().abs())


def test_float64_input_is_computed_in_float64(backend):
    x = torch.tensor([[1.0 + 1e-12]], dtype=torch.float64)
    norms = ops.neuron_norms([x], [torch.ones_like(x)])
    assert norms.dtype == torch.float32
    assert norms.item() == pytest.approx(1e-12, rel=1e-3)


def test_empty_list():
    assert ops.neuron_norms([]).shape == (0,)
    assert ops.neuron_norms([], []).dtype == torch.float32


def test_iterables_are_taken_once(backend):
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        norms = ops.neuron_norms(model.parameters())
    assert torch.allclose(norms[:2], model.weight.detach().abs().sum(1))


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("shape", [(70_001,), (70_001, 1), (70_001, 1, 1, 1)])
def test_rows_of_one_column(backend, ord, shape):
    """Their norm is the change itself, though squares overflow and vanish as in wider rows."""
    for dtype in DTYPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).exp().to(dtype)
        ref = torch.roll(x, 1, 0)
        x[300], x[40_000], ref[50_000] = math.nan, math.inf, -math.inf
        if dtype is not torch.float16:
            x[1000:1004], ref[1000:1004] = torch.tensor([1e-30, 1e-20, 1e20, 3e-39]).view(4, *shape[1:]), 0
        for refs in (None, [ref]):
            beside_zeros = [torch.stack([y.flatten(), torch.zeros_like(y.flatten())], 1) for y in (x, *(refs or ()))]
            expected = ops.neuron_norms(beside_zeros[:1], beside_zeros[1:] or None, ord=ord)
            torch.testing.assert_close(ops.neuron_norms([x], refs, ord=ord), expected, rtol=0, atol=0, equal_nan=True)


def test_rows_of_no_column_are_zero_between_others(backend):
    xs = [torch.ones(2, 1), torch.ones(3, 0), torch.ones(2, 5), torch.ones(2, 0)]
    for ord in ORDS:
        assert ops.neuron_norms(xs, ord=ord)[2:5].tolist() == [0, 0, 0]
        assert ops.neuron_norms(xs, ord=ord)[7:].tolist() == [0, 0]


def test_inputs_stay_untouched(backend):
    xs = tensor_list("transposed")
    copies = [x.clone() for x in xs]
    ops.neuron_norms(xs, copies)
    assert all(torch.equal(x, copy) for x, copy in zip(xs, copies, strict=True))


def test_backends_agree_to_a_few_ulp(backend):
    xs = tensor_list("ragged")
    refs = changed_like(xs)
    expected = reference.neuron_norms(xs, refs, 1)
    torch.testing.assert_close(ops.neuron_norms(xs, refs), expected, rtol=1e-6, atol=0)
