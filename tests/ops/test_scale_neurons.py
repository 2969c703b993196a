import math

import pytest
import torch

from bdfast import ops
from bdfast.testing import SHAPES, neuron_mask, tensor_list

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def expected_params(params, scale):
    factors = iter(scale)
    wide = torch.float64 if params[0].dtype == torch.float64 else torch.float32
    return [
        torch.stack([(row.to(wide) * next(factors).to(wide)).to(x.dtype) for row in x]) if len(x) else x.clone()
        for x in params
    ]


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"tall", "wide"}))
def test_equals_a_plain_loop(backend, name):
    for dtype in DTYPES:
        params = tensor_list(name, dtype=dtype)
        rows = sum(x.shape[0] for x in params)
        scale = torch.randn(rows, generator=torch.Generator().manual_seed(3))
        scale[::3] = 1
        expected = expected_params(params, scale)
        assert ops.scale_neurons_(params, scale) is None
        exactly(params, expected)


@pytest.mark.parametrize("name", ["tall", "wide"])
def test_large_lists(backend, name):
    params = tensor_list(name)
    scale = torch.linspace(-2, 2, params[0].shape[0])
    expected = params[0] * scale[:, None]
    ops.scale_neurons_(params, scale)
    exactly(params[0], expected)


def test_zero_prunes_and_one_keeps(backend):
    params = tensor_list("resnet18")
    before = [x.clone() for x in params]
    keep = neuron_mask(params)
    ops.scale_neurons_(params, keep.float())
    for param, old, mask in zip(params, before, keep.split([x.shape[0] for x in params]), strict=True):
        assert torch.equal(param[mask], old[mask])
        assert not param[~mask].any()


def test_sixteen_bit_products_are_rounded_once_to_nearest_even(backend):
    for dtype in (torch.bfloat16, torch.float16):
        every_value = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        for factor in (1 / 3, 1e-6, 3e4):
            params = [every_value.clone()[None]]
            ops.scale_neurons_(params, torch.tensor([factor]))
            exactly(params[0][0], (every_value.float() * torch.tensor(factor)).to(dtype))


def test_non_finite(backend):
    params = [torch.tensor([[math.inf, 1.0], [math.nan, 2.0], [3.0, 4.0]])]
    ops.scale_neurons_(params, torch.tensor([0.0, 1.0, math.nan]))
    assert params[0][0].isnan().tolist() == [True, False]
    assert params[0][1].isnan().tolist() == [True, False]
    assert params[0][2].isnan().all()


def test_parameters_that_require_grad(backend):
    layer = torch.nn.Linear(4, 3)
    ops.scale_neurons_(layer.parameters(), torch.zeros(6))
    assert not layer.weight.any()
    assert not layer.bias.any()


def test_empty_list():
    ops.scale_neurons_([], torch.zeros(0))


def test_wrong_use_changes_nothing(backend):
    params = [torch.ones(2, 2), torch.ones(3)]
    with pytest.raises(ValueError, match=r"scale: expected shape \[5\], one value per row .*, got \[4\]"):
        ops.scale_neurons_(params, torch.zeros(4))
    with pytest.raises(TypeError, match=r"scale: expected dtype torch.float32, got torch.bool; call scale.to"):
        ops.scale_neurons_(params, torch.zeros(5, dtype=torch.bool))
    assert all(bool((param == 1).all()) for param in params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_rounded_right(backend, dtype):
    """Subnormal results, ties, overflow to infinity and NaN among them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for factor in (0.5, 3.0, 1 / 3, 1 + 2**-9, 1e-3, 1e3, -2e-5, 1e-7):
        params = [every.clone().view(1, -1)]
        ops.scale_neurons_(params, torch.tensor([factor]))
        expected = (every.float() * torch.tensor(factor)).to(dtype)
        torch.testing.assert_close(params[0][0], expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(params[0][0].signbit()[~expected.isnan()], expected.signbit()[~expected.isnan()])
