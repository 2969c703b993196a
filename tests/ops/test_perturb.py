import math

import pytest
import torch

from bdfast import ops
from bdfast.ops import reference
from bdfast.testing import SHAPES, assert_matches, changed_like, tensor_list

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("sam", "asam", "path")
SCOPES = ("global", "tensor")


def wide(tensors):
    return [x.double() for x in tensors]


def fresh(tensors):
    return [torch.empty_like(x) for x in tensors]


def truth(params, dirs, rho, mode, scope):
    moved, saved = wide(params), fresh(wide(params))
    norm = reference.perturb_(moved, wide(dirs), saved, None, rho, mode, scope, 1e-12)
    return moved, norm


def assert_equals_truth(params, dirs, mode, scope, rho=0.5):
    """Weights and norm within the budget, saved weights to the bit."""
    moved, norm = truth(params, dirs, rho, mode, scope)
    plain, before = [x.clone() for x in params], [x.clone() for x in params]
    plain_norm = reference.perturb_(plain, dirs, fresh(params), None, rho, mode, scope, 1e-12)
    saved = fresh(params)
    actual_norm = ops.perturb_(params, dirs, saved, rho=rho, mode=mode, scope=scope)
    assert actual_norm.dtype == torch.float32
    assert_matches(actual_norm, norm, baseline=plain_norm)
    for i, param in enumerate(params):
        assert torch.equal(saved[i], before[i])
        scale = before[i].double().abs() + (moved[i] - before[i].double()).abs()
        assert_matches(param, moved[i], baseline=plain[i], scale=scale)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SHAPES)
def test_matches_float64(backend, name, mode, scope):
    for dtype in DTYPES:
        params = tensor_list(name, dtype=dtype)
        assert_equals_truth(params, changed_like(params, size=0.3), mode, scope)


def test_the_step_has_length_rho(backend):
    params, dirs = tensor_list("ragged"), tensor_list("ragged", seed=3)
    for mode in ("sam", "path"):
        moving, saved = [x.clone() for x in params], fresh(params)
        ops.perturb_(moving, dirs, saved, rho=0.25, mode=mode)
        length = torch.cat([(a - b).flatten() for a, b in zip(moving, saved, strict=True)]).norm()
        assert length.item() == pytest.approx(0.25, rel=1e-5)


def test_a_path_longer_than_rho_is_walked_towards_its_end_and_a_shorter_one_beyond(backend):
    for rho, expected in ((1.0, 1.0), (8.0, 8.0)):
        params, saved = [torch.zeros(1)], [torch.empty(1)]
        norm = ops.perturb_(params, [torch.full((1,), 4.0)], saved, rho=rho, mode="path")
        assert (norm.item(), params[0].item()) == (4.0, expected)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_known_norm_is_taken_as_it_is(backend, mode, scope):
    params = tensor_list("resnet18")
    dirs = changed_like(params)
    first, second = [x.clone() for x in params], [x.clone() for x in params]
    norm = ops.perturb_(first, dirs, fresh(params), rho=0.5, mode=mode, scope=scope)
    given = ops.perturb_(second, dirs, fresh(params), rho=0.5, mode=mode, scope=scope, norm=norm)
    assert torch.equal(given, norm)
    assert given.data_ptr() != norm.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_zero_norm_moves_nothing(backend, mode):
    params = [torch.tensor([1.0, -0.0, math.inf if mode == "sam" else 2.0]), torch.ones(2)]
    dirs = [x.clone() for x in params] if mode == "path" else [torch.zeros_like(x) for x in params]
    before, saved = [x.clone() for x in params], fresh(params)
    for scope in SCOPES:
        assert not ops.perturb_(params, dirs, saved, rho=1.0, mode=mode, scope=scope).any()
        for param, keep, start in zip(params, saved, before, strict=True):
            assert torch.equal(param.view(torch.int32), start.view(torch.int32))
            assert torch.equal(keep.view(torch.int32), start.view(torch.int32))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_norms_that_are_not_finite_move_nothing_and_tell(backend, mode, bad):
    params, dirs, saved = [torch.ones(3), torch.ones(2)], [torch.full((3,), bad), torch.full((2,), 2.0)], [0, 0]
    saved = fresh(params)
    norm = ops.perturb_(params, dirs, saved, rho=1.0, mode=mode)
    assert not norm.isfinite()
    assert all(bool((x == 1).all()) for x in (*params, *saved))

    norms = ops.perturb_(params, dirs, saved, rho=1.0, mode=mode, scope="tensor")
    assert norms.isfinite().tolist() == [False, True]
    assert bool((params[0] == 1).all())
    assert params[1].tolist() == pytest.approx([1 + 0.5**0.5] * 2)


def test_params_that_require_grad_and_their_version(backend):
    weight = torch.nn.Parameter(torch.ones(3))
    saved = [torch.empty(3)]
    versions = weight._version, saved[0]._version
    ops.perturb_([weight], [torch.ones(3)], saved, rho=1.0)
    assert weight.requires_grad
    assert weight._version > versions[0]
    assert saved[0]._version > versions[1]


def test_empty_list():
    assert ops.perturb_([], [], [], rho=1.0).tolist() == 0
    assert ops.perturb_([], [], [], rho=1.0, scope="tensor").shape == (0,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "adaptive"}, ValueError, r"mode: expected one of sam, asam, path, got 'adaptive';"),
        ({"scope": "tensors"}, ValueError, r"scope: expected .*, got 'tensors'; did you mean 'tensor'"),
        ({"norm": torch.ones(1)}, ValueError, r"norm: expected shape \[\] for scope 'global', got \[1\];"),
        (
            {"norm": torch.ones((), dtype=torch.float64)},
            TypeError,
            r"norm: expected dtype torch.float32, got torch.float64",
        ),
        ({"dirs": [torch.ones(2)]}, ValueError, r"dirs\[0\]: expected shape \[3\] like params\[0\], got \[2\]"),
        ({"saved": []}, ValueError, r"saved: expected 1 tensors like params, got 0"),
    ],
)
def test_wrong_use_changes_nothing(backend, options, error, message):
    params = [torch.ones(3)]
    arguments = {"dirs": [torch.ones(3)], "saved": [torch.zeros(3)], "rho": 1.0, **options}
    with pytest.raises(error, match=message):
        ops.perturb_(params, **arguments)
    assert params[0].tolist() == [1, 1, 1]


def test_shared_memory_is_refused(backend):
    params, other = [torch.ones(3)], [torch.ones(3)]
    for saved, message in (
        (params, r"saved\[0\]: expected memory of its own, since params is overwritten, got the memory of params\[0\]"),
        (other, r"dirs\[0\]: expected memory of its own, since saved is overwritten, got the memory of saved\[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.perturb_(params, other, saved, rho=1.0)
    assert params[0].tolist() == [1, 1, 1]
