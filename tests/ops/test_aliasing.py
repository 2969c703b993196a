"""Memory that is reached in more than one way, and addresses that no kernel can read: right, or refused and named."""

import numpy as np
import pytest
import torch

from bdfast import ops
from bdfast.ops import aliasing, reference
from bdfast.testing import changed_like, tensor_list

LARGE = (16 << 20) // 4 + 100  # elements; more than kStreamedBytes of csrc/cpu/memory.h


def windows(*starts, size=6, seed=0):
    """Overlapping stretches of one new buffer."""
    base = torch.randn(max(starts) + size, generator=torch.Generator().manual_seed(seed))
    return [base[start : start + size] for start in starts]


def fresh(*shape, seed=9):
    return torch.randn(*shape or (6,), generator=torch.Generator().manual_seed(seed))


def odd(numel, dtype=torch.float32, seed=3):
    """A tensor that starts one byte behind a multiple of its item size."""
    memory = np.zeros(numel * dtype.itemsize + 1 + dtype.itemsize, dtype=np.uint8)
    offset = -memory.ctypes.data % dtype.itemsize + 1
    x = torch.frombuffer(memory, dtype=dtype, count=numel, offset=offset)
    assert x.data_ptr() % dtype.itemsize == 1
    return x.copy_(fresh(numel, seed=seed))


def assert_refused(message, call, *tensors):
    before = [x.clone() for x in tensors]
    with pytest.raises(ValueError, match=message):
        call()
    assert all(map(torch.equal, tensors, before))


def scale(params, factors=None):
    factors = torch.full((sum(len(x) for x in params),), 2.0) if factors is None else factors
    ops.scale_neurons_(params, factors)


OWN = "expected memory of its own, since params is overwritten, got memory that overlaps"


@pytest.mark.parametrize("shift", [-5, -1, 1, 5])
def test_gradients_shifted_into_the_params(backend, shift):
    param, grad = windows(10, 10 + shift)
    message = rf"sharp_step_: grads\[0\]: {OWN} params\[0\]; pass grads\[0\].clone\(\)"
    assert_refused(message, lambda: ops.sharp_step_([param], [fresh()], [grad], lr=0.1), param, grad)
    message = rf"perturb_: dirs\[1\]: {OWN} params\[1\]"
    dirs, saved = [fresh(2), grad], [fresh(2), fresh()]
    assert_refused(message, lambda: ops.perturb_([fresh(2), param], dirs, saved, rho=1.0), param, *saved)
    message = rf"zero_changed_: refs\[0\]: {OWN} params\[0\]"
    everything = torch.ones(6, dtype=torch.bool)
    assert_refused(message, lambda: ops.zero_changed_([param], [fresh()], [grad], everything, 0.1), param)


def test_a_view_into_another_parameter(backend):
    """Of any shape, and at the same start."""
    large = fresh(8, 5)
    for view in (large[1:3], large[7], large.flatten()[4:6], large[:2]):
        got = "the memory of" if view.data_ptr() == large.data_ptr() else "memory that overlaps"
        message = rf"params\[2\]: expected every parameter once, got {got} params\[0\]; leave out .* tied"
        assert_refused(message, lambda view=view: scale([large, fresh(), view]), large)


def test_saved_in_another_order(backend):
    params = [fresh(seed=1), fresh(seed=2)]
    message = r"saved\[0\]: expected memory of its own, since params is overwritten, got the memory of params\[1\]"
    assert_refused(message, lambda: ops.sharp_step_(params, params[::-1], [fresh()] * 2, lr=0.1), *params)
    message = r"xs\[0\]: expected memory of its own, since params is overwritten, got the memory of params\[1\]"
    everything = torch.ones(12, dtype=torch.bool)
    assert_refused(message, lambda: ops.zero_changed_(params, params[::-1], params, everything, 0.1), *params)
    message = r"dirs\[0\]: expected memory of its own, since params is overwritten, got the memory of params\[1\]"
    saved = [fresh(), fresh()]
    assert_refused(message, lambda: ops.perturb_(params, params[::-1], saved, rho=0.1), *params, *saved)


def test_buffers_that_overlap_what_is_read_or_written(backend):
    param, buffer, saved = windows(0, 3, 8)
    options = {"lr": 0.1, "momentum": 0.9}
    message = rf"momentum_buffers\[0\]: {OWN} params\[0\]"
    assert_refused(message, lambda: ops.sharp_step_([param], [fresh()], [fresh()], [buffer], **options), param, buffer)
    message = r"saved\[0\]: expected memory of its own, since momentum_buffers is overwritten, got memory that overlaps"
    assert_refused(message, lambda: ops.sharp_step_([fresh()], [saved], [fresh()], [buffer], **options), saved, buffer)
    message = rf"saved\[0\]: {OWN} params\[0\]"
    assert_refused(message, lambda: ops.perturb_([param], [fresh()], [buffer], rho=0.1), param, buffer)


def test_vectors_inside_the_params(backend):
    """Whether a factor or a mask was read before or after it was overwritten would depend on the threads."""
    param = fresh(4, 3)
    factors = param.flatten()[5:9]
    assert_refused(rf"scale: {OWN} params\[0\]; pass scale.clone", lambda: scale([param], factors), param)
    tau = param[2, 1]
    arguments = [param], [fresh(4, 3)], [fresh(4, 3)]
    everything = torch.ones(4, dtype=torch.bool)
    assert_refused(rf"tau: {OWN} params\[0\]", lambda: ops.zero_changed_(*arguments, everything, tau), param)
    mask = param.view(torch.uint8).flatten()[7:11].view(torch.bool)
    assert_refused(rf"neurons: {OWN} params\[0\]", lambda: ops.zero_changed_(*arguments, mask, 0.1), param)
    message = r"norm: expected memory of its own, since saved is overwritten, got the memory of saved\[0\]"
    assert_refused(message, lambda: ops.perturb_(*arguments, rho=0.1, norm=arguments[2][0][0, 0]), param)


@pytest.mark.parametrize("size", [6, LARGE])
def test_the_same_tensor_at_the_same_index_is_right(backend, size):
    """In place, streamed or not: the numbers of separate tensors, to the bit."""
    start, other = fresh(size, seed=1), fresh(size, seed=2)
    for mode in ("sam", "asam"):
        param, alone, saved = start.clone(), start.clone(), torch.empty_like(start)
        norm = ops.perturb_([param], [param], [saved], rho=0.5, mode=mode)
        assert torch.equal(norm, ops.perturb_([alone], [start], [torch.empty_like(start)], rho=0.5, mode=mode))
        assert torch.equal(param, alone)
        assert torch.equal(saved, start)
    param, alone = start.clone(), torch.empty_like(start)
    ops.sharp_step_([param], [param], [other], lr=0.1, reference=[other])
    ops.sharp_step_([alone], [start], [other], lr=0.1, reference=[other])
    assert torch.equal(param, alone)


def test_neighbours_in_one_buffer_share_nothing(backend):
    """As the views of a flat parameter or of a bucket of gradients."""
    buffer = fresh(60)
    expected = [2 * x for x in buffer.clone().split([7, 1, 12, 40])]
    params = list(buffer.split([7, 1, 12, 40]))
    scale(params)
    assert all(map(torch.equal, params, expected))
    ops.sharp_step_(params[:1], params[:1], [buffer[7:14]], lr=1.0)
    assert torch.equal(params[0], expected[0] - buffer[7:14])


def test_views_that_lie_between_each_other(backend):
    """Heads of a fused weight: their address ranges meet, their elements do not, unless the windows overlap."""
    fused = fresh(5, 12)
    expected = fused * torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(4)
    heads = list(fused.split(4, dim=1))
    ops.scale_neurons_(heads, torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(5))
    assert torch.equal(fused, expected)
    ops.sharp_step_([fused[:, :4]], [fused[:, :4]], [fused[:, 4:8]], lr=1.0)
    assert torch.equal(fused[:, :4], expected[:, :4] - expected[:, 4:8])
    message = r"params\[1\]: expected every parameter once, got memory that overlaps params\[0\]"
    assert_refused(message, lambda: scale([fused[:, :4], fused[:, 3:7]]), fused)
    head, message = [fused[:, :4]], rf"grads\[0\]: {OWN} params\[0\]"
    assert_refused(message, lambda: ops.sharp_step_(head, head, [fused[:, 3:7]], lr=1.0), fused)


@pytest.mark.parametrize("numel", [9, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_addresses_between_items(backend, dtype, numel):
    """Read and written as if they were aligned, and nothing beside them."""
    if numel == LARGE and dtype is torch.float64:
        numel //= 2
    lists = [odd(numel, dtype, seed) for seed in range(4)]
    aligned = [x.clone() for x in lists]
    rho = 0.5 * numel**0.5
    for param, direction, saved, buffer in (lists, aligned):
        param.norm_ = ops.perturb_([param], [direction], [saved], rho=rho, mode="asam")
        ops.sharp_step_([param], [saved], [direction], [buffer], lr=0.1, momentum=0.9)
        ops.scale_neurons_([param], torch.full((numel,), 0.5))
        everything = torch.ones(numel, dtype=torch.bool)
        tau = ops.kth_largest_change([param], [saved], everything, numel // 2)
        ops.zero_changed_([param], [param], [saved], everything, tau)
        param.norms = ops.neuron_norms([param], [saved])
    assert all(map(torch.equal, lists, aligned))
    assert torch.equal(lists[0].norms, aligned[0].norms)
    assert torch.equal(lists[0].norm_, aligned[0].norm_)


def test_vectors_between_items(backend):
    params, expected = [fresh(6)], [fresh(6)]
    factors = odd(6)
    ops.scale_neurons_(params, factors)
    reference.scale_neurons_(expected, factors.clone())
    assert torch.equal(params[0], expected[0])
    ops.perturb_(params, [fresh(6)], [fresh(6)], rho=1.0, norm=odd(1).abs().add_(1)[0])


def test_addresses_between_items_are_refused_where_pytorch_cannot_copy_them(monkeypatch):
    monkeypatch.setattr(aliasing, "COPIED_ON", ())
    params = [fresh(), odd(6)]
    message = r"params\[1\]: expected an address that is a multiple of 4 bytes, got 0x.*[159d]; copy the data"
    assert_refused(message, lambda: scale(params), *params)
    with pytest.raises(ValueError, match="scale: expected an address that is a multiple of 4 bytes"):
        scale([fresh()], odd(6))


def test_strides_of_dimensions_of_size_one_are_ignored(backend):
    """In lists of channels-last weights too, and where a list has no element at all."""
    memory = [fresh(96, seed=seed) for seed in range(3)]
    strides = [(24, 1, 8, 8), (24, 1, 8, 24), (24, 1, 8, 96)]
    param, saved, grad = (x.as_strided((4, 8, 3, 1), steps) for x, steps in zip(memory, strides, strict=True))
    ops.sharp_step_([param], [saved], [grad], lr=0.5)
    assert torch.equal(param, saved - 0.5 * grad)
    empty = [torch.empty(0, 4, 3), torch.empty(0, 3, 4).transpose(1, 2)]
    assert ops.neuron_norms([param, empty[0]], [saved, empty[1]]).shape == (4,)


def test_meta_tensors_share_nothing():
    params = [torch.ones(3, device="meta"), torch.ones(3, device="meta")]
    ops.scale_neurons_(params, torch.ones(6, device="meta"))
    assert ops.perturb_(params, params, [torch.empty_like(x) for x in params], rho=1.0).is_meta


def test_freed_memory_is_refused(backend):
    param = fresh()
    param.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"xs\[1\]: expected a tensor with memory, got one at address 0; restore"):
        ops.neuron_norms([fresh(), param])
    with pytest.raises(ValueError, match=r"scale: expected a tensor with memory"):
        scale([fresh()], param)


def test_negated_views_are_written_in_place(backend):
    memory = fresh()
    negated = torch._neg_view(memory)
    expected = -2 * memory
    scale([negated])
    assert torch.equal(negated, expected)
    assert torch.equal(memory, -expected)


def test_copies_on_write_share_nothing(backend):
    param = fresh()
    before = param.clone()
    saved, grad = torch._lazy_clone(param), torch._lazy_clone(param)
    ops.sharp_step_([param], [saved], [grad], lr=0.5)
    assert torch.equal(param, 0.5 * before)
    assert torch.equal(saved, before)
    ops.perturb_([param], [before], [torch._lazy_clone(param)], rho=1.0)


@pytest.mark.parametrize("seed", range(5))
def test_of_many_tensors_the_pair_that_overlaps_is_found(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    params = tensor_list("many")
    grads = changed_like(params)
    i, j = torch.randint(1, 300, (2,), generator=generator).tolist()
    base = torch.randn(params[i].numel() + grads[j].numel() - 1, generator=generator)
    params[i] = base[: params[i].numel()].view(params[i].shape)
    grads[j] = base[params[i].numel() - 1 :].view(grads[j].shape)
    saved = [x.clone() for x in params]
    assert_refused(
        rf"grads\[{j}\]: {OWN} params\[{i}\]" if params[i].numel() > 1 else rf"grads\[{j}\]: .* params\[{i}\]",
        lambda: ops.sharp_step_(params, saved, grads, lr=0.1),
        *params,
    )
