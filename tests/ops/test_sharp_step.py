import math

import pytest
import torch

from bdfast import ops
from bdfast.ops import reference
from bdfast.testing import SHAPES, assert_matches, changed_like, tensor_list

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 5e-4},
    "mixed": {"lr": 0.05, "momentum": 0.9, "alpha": 0.7, "nesterov": True},
    "mixed, no momentum": {"lr": 0.05, "alpha": 0.7, "weight_decay": 0.1},
    "ascent": {"lr": 0.02, "momentum": 0.9, "maximize": True, "weight_decay": 1e-2},
}


def wide(tensors):
    return None if tensors is None else [x.double() for x in tensors]


def scene(name, dtype=torch.float32, distance=True, **options):
    """All lists of a call; the optional ones where the options use them."""
    saved = tensor_list(name, dtype=dtype)
    return {
        "params": [torch.full_like(x, math.nan) for x in saved],
        "saved": saved,
        "grads": changed_like(saved, size=0.5, seed=2),
        "momentum_buffers": changed_like(saved, size=0.5, seed=3) if options.get("momentum") else None,
        "first_grads": changed_like(saved, size=0.5, seed=4) if "alpha" in options else None,
        "reference": changed_like(saved, seed=5) if distance else None,
    }


def as_reference(lists, options):
    """The reference's result for copies of the lists: params, buffers, squared distance."""
    lists = {key: None if xs is None else [x.clone() for x in xs] for key, xs in lists.items()}
    defaults = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, "alpha": 1.0}
    given = {**defaults, "maximize": False, **options}
    order = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "alpha", "maximize")
    squared = reference.sharp_step_(*[xs or [] for xs in lists.values()], *[given[key] for key in order])
    return lists["params"], lists["momentum_buffers"], squared


@pytest.mark.parametrize("distance", [False, True])
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_matches_float64(backend, name, case, distance):
    options = OPTIONS[case]
    for dtype in DTYPES:
        lists = scene(name, dtype, distance, **options)
        expected = as_reference({key: wide(xs) for key, xs in lists.items()}, options)
        plain = as_reference(lists, options)
        before = {key: [x.clone() for x in lists[key]] for key in ("saved", "grads")}
        squared = ops.sharp_step_(**lists, **options)
        for i, weight in enumerate(before["saved"]):
            size = weight.double().abs() + before["grads"][i].double().abs() + 4
            assert_matches(lists["params"][i], expected[0][i], baseline=plain[0][i], scale=size)
            if options.get("momentum"):
                assert_matches(lists["momentum_buffers"][i], expected[1][i], baseline=plain[1][i], scale=size)
            assert torch.equal(lists["saved"][i], weight)
            assert torch.equal(lists["grads"][i], before["grads"][i])
        if distance:
            assert_matches(squared, expected[2], baseline=plain[2])
        else:
            assert squared is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
        {"momentum": 0.8, "dampening": 0.3, "maximize": True},
    ],
)
def test_is_the_sgd_of_torch(backend, options):
    start = tensor_list("ragged", dtype=torch.float64)
    theirs = [x.clone().requires_grad_() for x in start]
    optimizer = torch.optim.SGD(theirs, lr=0.1, **options)
    ours = [x.clone() for x in start]
    buffers = [torch.zeros_like(x) for x in start] if options.get("momentum") else None
    for step in range(4):
        gradients = tensor_list("ragged", dtype=torch.float64, seed=10 + step)
        for param, gradient in zip(theirs, gradients, strict=True):
            param.grad = gradient.clone()
        optimizer.step()
        first = {"dampening": 0.0} if step == 0 else {}
        ops.sharp_step_(ours, ours, gradients, buffers, lr=0.1, **{**options, **first})
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-13, atol=1e-13)


def test_perturbed_weights_are_left_without_a_trace(backend):
    """Away and back with a zero gradient: the weights are what they were, to the bit."""
    params = tensor_list("resnet18")
    before, saved = [x.clone() for x in params], [torch.empty_like(x) for x in params]
    ops.perturb_(params, tensor_list("resnet18", seed=7), saved, rho=3.0)
    ops.sharp_step_(params, saved, [torch.zeros_like(x) for x in params], lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_the_distance_is_the_norm_of_the_next_path_step(backend):
    params, saved = tensor_list("resnet18"), [torch.empty_like(x) for x in tensor_list("resnet18")]
    end = changed_like(params, seed=9)
    squared = ops.sharp_step_(params, params, changed_like(params), lr=0.1, reference=end)
    norm = ops.perturb_([x.clone() for x in params], end, saved, rho=0.5, mode="path")
    assert squared.sqrt().item() == pytest.approx(norm.item(), rel=1e-6)


def test_nan_and_infinity_stay_where_they_are(backend):
    grads = torch.zeros(100)
    grads[3], grads[98] = math.nan, math.inf
    params = [torch.empty(100)]
    ops.sharp_step_(params, [torch.ones(100)], [grads], lr=0.5)
    assert params[0].isnan().nonzero().flatten().tolist() == [3]
    assert params[0].isinf().nonzero().flatten().tolist() == [98]


def test_versions_count(backend):
    params, buffers = [torch.ones(3)], [torch.zeros(3)]
    versions = params[0]._version, buffers[0]._version
    ops.sharp_step_(params, params, [torch.ones(3)], buffers, lr=0.1, momentum=0.9)
    assert params[0]._version > versions[0]
    assert buffers[0]._version > versions[1]


def test_empty_list():
    assert ops.sharp_step_([], [], [], lr=0.1) is None
    assert ops.sharp_step_([], [], [], lr=0.1, reference=[]).item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.9}, r"momentum_buffers: expected a list with momentum=0.9, got none; pass"),
        ({"momentum_buffers": [torch.ones(3)]}, r"momentum_buffers: expected none with momentum=0, got a list; leave"),
        ({"alpha": 0.5}, r"first_grads: expected a list with alpha=0.5, got none"),
        ({"first_grads": [torch.ones(3)]}, r"first_grads: expected none with alpha=1, got a list"),
        ({"reference": [torch.ones(4)]}, r"reference\[0\]: expected shape \[3\] like params\[0\], got \[4\]"),
        ({"grads": []}, r"grads: expected 1 tensors like params, got 0"),
        ({"momentum": 0.9, "momentum_buffers": []}, r"momentum_buffers: expected 1 tensors like params, got 0"),
        ({"reference": []}, r"reference: expected 1 tensors like params, got 0"),
    ],
)
def test_wrong_use_changes_nothing(backend, options, message):
    params = [torch.ones(3)]
    arguments = {"saved": [torch.zeros(3)], "grads": [torch.ones(3)], "lr": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        ops.sharp_step_(params, **arguments)
    assert params[0].tolist() == [1, 1, 1]


def test_shared_memory_is_refused(backend):
    params, saved, buffers = [torch.ones(3)], [torch.ones(3)], [torch.ones(3)]
    with pytest.raises(ValueError, match=r"grads\[0\]: expected memory of its own, .* got the memory of params\[0\]"):
        ops.sharp_step_(params, saved, params, lr=0.1)
    with pytest.raises(
        ValueError, match=r"saved\[0\]: expected memory of its own, .* got the memory of momentum_buffers\[0\]"
    ):
        ops.sharp_step_(params, buffers, saved, buffers, lr=0.1, momentum=0.9)
