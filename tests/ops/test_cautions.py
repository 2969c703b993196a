"""Results that are right and probably not what was wanted are warned of, once."""

import warnings

import pytest
import torch

from bdfast import ops
from bdfast.ops import cautions

SMALL = 1e-4


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    monkeypatch.setattr(cautions, "_given", set())
    monkeypatch.setattr(cautions, "_seen", set())


def expect(message):
    return pytest.warns(UserWarning, match=message)


def norms(x):
    return ops.neuron_norms([torch.ones(2, 3), x])


def kth(x):
    return ops.kth_largest_change([torch.ones(2, 3), x], [torch.zeros(2, 3)] * 2, torch.ones(4, dtype=torch.bool), 1)


@pytest.mark.parametrize("call", [norms, kth])
def test_a_result_without_gradient_is_warned_of_once(backend, call):
    x = torch.ones(2, 3, requires_grad=True)
    message = r"xs\[1\]: expected a tensor that requires no gradient, got requires_grad=True; .* under torch.no_grad"
    with expect(message) as given:
        assert not call(x).requires_grad
    assert given[0].filename == __file__
    call(x * 2)


def test_no_warning_where_no_gradient_is_lost(backend):
    x = torch.ones(2, 3, requires_grad=True)
    norms(x.detach())
    with torch.no_grad():
        norms(x)
    ops.scale_neurons_([x], torch.ones(2))
    ops.perturb_([x], [torch.ones(2, 3)], [torch.ones(2, 3)], rho=1.0)


def test_references_that_require_a_gradient_and_transforms(backend):
    x = torch.ones(2, 3)
    with expect(r"neuron_norms: refs\[0\]"):
        ops.neuron_norms([x], [x.clone().requires_grad_()])
    cautions._given.clear()
    with expect(r"neuron_norms: xs\[0\]"):
        assert not torch.func.grad(lambda x: ops.neuron_norms([x]).sum())(x).any()


def test_where_warnings_are_errors_every_one_is(backend):
    x = torch.ones(2, 3, requires_grad=True)
    for _ in range(2):
        with pytest.raises(UserWarning):
            norms(x)


def step(dtype, rho, mode="sam", scope="global", size=50, lists=1, directions=1.0):
    params = [torch.full((size,), 2.0, dtype=dtype) for _ in range(lists)]
    dirs = [torch.full((size,), directions, dtype=dtype) for _ in range(lists)]
    ops.perturb_(params, dirs, [torch.empty_like(x) for x in params], rho=rho, mode=mode, scope=scope)
    return params


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("mode", ["sam", "asam", "path"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_below_the_spacing_of_the_weights_is_warned_of_once(backend, dtype, mode, scope):
    step(dtype, 1.0, mode, scope, lists=3)  # a first step that moves hides none that does not
    with expect(rf"perturb_: rho: expected a step that weights in {dtype} can take, got 1e-05, .*raise rho") as given:
        (first, *_) = step(dtype, 1e-5, mode, scope, lists=3)
    assert given[0].filename == __file__
    assert bool((first == 2).all())
    step(dtype, 1e-5, mode, scope)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"rho": 1.0}),
        (torch.bfloat16, {"rho": 0.0}),
        (torch.bfloat16, {"rho": SMALL, "directions": 0.0}),
        (torch.bfloat16, {"rho": SMALL, "directions": float("nan")}),
        (torch.bfloat16, {"rho": SMALL, "directions": 2.0, "mode": "path"}),
        (torch.bfloat16, {"rho": SMALL, "size": 0}),
        (torch.bfloat16, {"rho": SMALL, "lists": 0}),
        (torch.float32, {"rho": 1e-12}),
    ],
)
def test_no_warning_where_nothing_was_to_move(backend, dtype, options):
    for scope in ("global", "tensor"):
        step(dtype, scope=scope, **options)


def test_weights_that_were_transposed_or_do_not_start_the_list(backend):
    weight = torch.full((4, 6), 2.0, dtype=torch.bfloat16)
    still = torch.zeros(3, 2, dtype=torch.bfloat16)
    with expect("perturb_: rho"):
        ops.perturb_(
            [still, weight.t()],
            [still.clone(), torch.ones_like(weight).t()],
            [still.clone(), weight.clone().t()],
            rho=SMALL,
        )
    cautions._given.clear()
    ops.perturb_([still, weight], [still.clone(), torch.ones_like(weight)], [still.clone(), weight.clone()], rho=2.0)


def test_a_step_that_moves_one_weight_is_no_loss(backend):
    param = torch.full((50,), 2.0, dtype=torch.bfloat16)
    param[7] = 0
    ops.perturb_([param], [torch.ones_like(param)], [param.clone()], rho=SMALL)
    assert param[7] != 0


def test_nothing_is_warned_of_in_float32_where_warnings_are_errors(backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(torch.float32, 1e-12)
