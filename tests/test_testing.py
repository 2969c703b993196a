import math

import pytest
import torch

from bdfast.testing import SHAPES, assert_matches, changed_like, neuron_mask, tensor_list

EPS = torch.finfo(torch.float32).eps


def test_a_few_roundings_are_in_the_budget():
    truth = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    assert_matches(truth.float() * (1 + 4 * EPS), truth)


def test_more_than_that_is_not():
    truth = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    actual = truth.float()
    actual[1, 0] += 1e-4
    with pytest.raises(AssertionError, match=r"1 of 4 elements .* at the worst, \(1, 0\): expected 3, got 3\.0000999"):
        assert_matches(actual, truth)


def test_the_error_of_the_baseline_counts_twice():
    truth = torch.tensor([1.0], dtype=torch.float64)
    assert_matches(torch.tensor([1.0015]), truth, baseline=torch.tensor([0.999]))
    with pytest.raises(AssertionError):
        assert_matches(torch.tensor([1.0025]), truth, baseline=torch.tensor([0.999]))


def test_scale_covers_cancellation():
    truth = torch.tensor([0.0], dtype=torch.float64)
    assert_matches(torch.tensor([5 * EPS]), truth, scale=torch.tensor([1.0]))
    with pytest.raises(AssertionError):
        assert_matches(torch.tensor([5 * EPS]), truth)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_non_finite_must_match(wrong):
    truth = torch.tensor([wrong], dtype=torch.float64)
    assert_matches(torch.tensor([wrong]), truth)
    with pytest.raises(AssertionError):
        assert_matches(torch.tensor([1.0]), truth)
    with pytest.raises(AssertionError):
        assert_matches(torch.tensor([wrong]), torch.ones(1, dtype=torch.float64))


def test_values_beyond_the_dtype_are_infinite():
    assert_matches(torch.tensor([math.inf], dtype=torch.float16), torch.tensor([1e6], dtype=torch.float64))
    with pytest.raises(AssertionError):
        assert_matches(torch.tensor([65504.0], dtype=torch.float16), torch.tensor([1e6], dtype=torch.float64))


def test_wrong_use():
    with pytest.raises(ValueError, match=r"assert_matches: expected: expected dtype torch.float64, got torch.float32"):
        assert_matches(torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"assert_matches: actual: expected shape \[1\] like the truth, got \[2\]"):
        assert_matches(torch.ones(2), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("name", SHAPES)
def test_tensor_lists(name):
    xs = tensor_list(name, dtype=torch.bfloat16)
    again = tensor_list(name, dtype=torch.bfloat16)
    assert all(torch.equal(x, y) for x, y in zip(xs, again, strict=True))
    changed = changed_like(xs)
    assert [x.stride() for x in changed] == [x.stride() for x in xs]
    assert all(x.dtype == torch.bfloat16 for x in changed)
    assert len(neuron_mask(xs)) == sum(len(x) for x in xs)


def test_resnet18_has_its_62_parameters():
    assert len(SHAPES["resnet18"]) == 62
