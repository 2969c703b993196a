"""Every wrong argument is named, with its index, what was expected and what to do."""

import pytest
import torch

from bdfast import ops
from bdfast.ops import checks

ONES = torch.ones(2, 3)


def call_norms(xs, refs):
    return ops.neuron_norms(xs, refs)


def call_kth(xs, refs):
    return ops.kth_largest_change(xs, refs, torch.ones(sum(len(x) for x in xs if x.ndim), dtype=torch.bool), 1)


def call_zero(xs, refs):
    return ops.zero_changed_(refs, xs, refs, torch.ones(sum(len(x) for x in xs if x.ndim), dtype=torch.bool), 1.0)


LISTS = [
    ([ONES, ONES], [ONES], ValueError, "expected 2 tensors like .*, got 1;"),
    ([ONES, ONES], [ONES, torch.ones(3, 2)], ValueError, r"\[1\]: expected shape \[\d, \d\] like .*, got \[\d, \d\];"),
    (
        [ONES, ONES],
        [ONES, ONES.double()],
        TypeError,
        r"\[1\]: expected dtype torch.float32 like .*, got torch.float64;",
    ),
    ([ONES, ONES], [ONES, ONES.to("meta")], ValueError, r"\[1\]: expected device cpu like .*, got meta; move it"),
    ([ONES.t()], [ONES.t().contiguous()], ValueError, r"\[0\]: expected strides \(\d, \d\) like .*, got \(\d, \d\);"),
    (
        [ONES, torch.ones(())],
        [ONES, torch.ones(())],
        ValueError,
        r"\[1\]: expected at least one dimension, the neurons, got none; .*reshape\(1\)",
    ),
    (
        [ONES.long()],
        [ONES.long()],
        TypeError,
        r"\[0\]: expected dtype float32, bfloat16, float16 or float64, got torch.int64;",
    ),
    (
        [ONES, ONES.to_sparse()],
        [ONES, ONES],
        TypeError,
        r"\[1\]: expected layout torch.strided, got torch.sparse_coo; .*to_dense",
    ),
]


@pytest.mark.parametrize("call", [call_norms, call_kth, call_zero])
@pytest.mark.parametrize(("xs", "refs", "error", "message"), LISTS)
def test_lists(call, xs, refs, error, message):
    if not (call is call_zero and refs[-1] is ONES):
        with pytest.raises(error, match=message):
            call(xs, refs)


def test_a_list_before_the_wrong_one_is_not_blamed():
    with pytest.raises(
        TypeError, match=r"neuron_norms: xs\[2\]: expected dtype torch.float32 like xs\[0\], got torch.float16"
    ):
        ops.neuron_norms([ONES, ONES, ONES.half()], [ONES, ONES, ONES])


def test_an_empty_list_does_not_stand_for_one_that_was_left_out():
    with pytest.raises(ValueError, match=r"refs: expected 1 tensors like xs, got 0"):
        ops.neuron_norms([ONES], [])


def test_missing_gradient():
    with pytest.raises(TypeError, match=r"xs\[1\]: expected a tensor, got a NoneType; leave out .* no gradient"):
        ops.neuron_norms([ONES, None])


def test_lone_tensor():
    with pytest.raises(TypeError, match=r"xs: expected a list of tensors, got a single tensor; write \[xs\]"):
        ops.neuron_norms(ONES)
    with pytest.raises(TypeError, match="params: expected a list of tensors, got a single tensor"):
        ops.scale_neurons_(ONES, torch.ones(2))


@pytest.mark.parametrize("ord", [0, 3, -1, 1.5, float("nan"), "fro"])
def test_ord(ord):
    with pytest.raises(ValueError, match=r"neuron_norms: ord: expected 1, 2 or inf, got "):
        ops.neuron_norms([ONES], ord=ord)


@pytest.mark.parametrize(
    ("neurons", "error", "message"),
    [
        (
            torch.ones(3, dtype=torch.bool),
            ValueError,
            r"neurons: expected shape \[2\], one value per row .*, got \[3\]",
        ),
        (torch.ones(2, 1, dtype=torch.bool), ValueError, r"neurons: expected shape \[2\], .*, got \[2, 1\]"),
        (torch.ones(2), TypeError, r"neurons: expected dtype torch.bool, got torch.float32; call neurons.to"),
        ([True, False], TypeError, r"neurons: expected a torch.bool tensor, got a list; use torch.as_tensor"),
        (torch.ones(2, dtype=torch.bool, device="meta"), ValueError, "neurons: expected device cpu like xs, got meta"),
    ],
)
def test_neurons(neurons, error, message):
    with pytest.raises(error, match=f"kth_largest_change: {message}"):
        ops.kth_largest_change([ONES], [ONES], neurons, 1)


@pytest.mark.parametrize("shape", [(1, 3), (2, 1)])
def test_expanded_memory_is_not_written_to(shape):
    expanded = torch.ones(shape).expand(2, 3)
    with pytest.raises(ValueError, match=r"params\[1\]: expected memory of its own .*, got strides .*clone"):
        ops.scale_neurons_([torch.ones(1), expanded], torch.zeros(3))
    assert expanded.all()


def test_overlapping_windows_are_not_written_to():
    windows = torch.ones(6).unfold(0, 3, 1)
    with pytest.raises(ValueError, match=r"params\[0\]: expected memory of its own .*, got strides \(1, 1\)"):
        ops.scale_neurons_([windows], torch.zeros(4))


def test_expanded_memory_may_be_read():
    expanded = torch.full((1, 3), 2.0).expand(2, 3)
    assert ops.neuron_norms([expanded]).tolist() == [6, 6]


def test_tied_parameters_are_not_written_to_twice():
    weight = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=r"params\[2\]: expected every parameter once, got the memory of params\[0\]; .*tied"
    ):
        ops.scale_neurons_([weight, torch.ones(2, 3), weight.view(2, 3)], torch.full((6,), 2.0))
    assert (weight == 1).all()


def test_empty_tensors_share_nothing():
    empty = torch.ones(0, 3)
    ops.scale_neurons_([empty, empty], torch.zeros(0))


@pytest.mark.parametrize(
    ("x", "dense"),
    [
        (torch.ones(2, 3, 4), True),
        (torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), True),
        (torch.ones(2, 4, 3).transpose(1, 2), True),
        (torch.ones(1, 4, 3)[:, :, :2].transpose(1, 2), False),
        (torch.ones(3, 2).t(), False),
        (torch.ones(4, 6)[:, :3], False),
        (torch.ones(4, 6)[::2], False),
        (torch.ones(8, 6)[2:5], True),
        (torch.ones(6)[::2], False),
        (torch.ones(3, 1).expand(3, 4), False),
        (torch.ones(1, 4).expand(3, 4), False),
        (torch.ones(0, 3), True),
        (torch.ones(3, 5, 1).transpose(0, 2), True),
    ],
)
def test_rows_are_dense(x, dense):
    assert checks.rows_are_dense(x) is dense


def test_size_one_dimensions_have_no_strides():
    x = torch.ones(4, 8, 1, 1)
    ref = torch.zeros(4, 8, 1, 1).to(memory_format=torch.channels_last)
    odd = torch.as_strided(torch.zeros(32), (4, 8, 1, 1), (8, 1, 77, 55))
    assert ops.neuron_norms([x, x], [ref, odd]).tolist() == [8] * 8


@pytest.mark.parametrize("view", [lambda w: w.transpose(0, 1), lambda w: w[:, 1:], lambda w: w[::2], lambda w: w.mT])
def test_views_without_dense_rows_are_written_in_place(backend, view):
    weight, x = torch.ones(6, 4, 3, 3), torch.ones(6, 4, 3, 3)
    rows = view(weight).shape[0]
    scale = torch.arange(2.0, 2.0 + rows)
    ops.scale_neurons_([view(weight)], scale)
    assert torch.equal(view(weight), view(x) * scale.view(-1, 1, 1, 1))
    neurons = torch.arange(rows) < 2
    count = ops.zero_changed_([view(weight)], [view(x)], [view(torch.zeros_like(x))], neurons, 1.0)
    assert count.item() == view(x)[:2].numel()
    assert not view(weight)[:2].any()
    assert view(weight)[2:].all()
