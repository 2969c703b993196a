"""Run by test_interpreted.py, with TRITON_INTERPRET=1: flat lists, launches and uploads.

Casts to bfloat16 are cut off there instead of rounded, which the error budget has room for.
"""

import math

import pytest
import torch
from scenes import CASES, around, copies, like, same_bits, scene, wide

from bdfast.kernels import KERNELS, tables
from bdfast.ops import reference
from bdfast.testing import assert_matches, changed_like, tensor_list

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OPTIONS = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 5e-4},
    "mixed": {"lr": 0.05, "momentum": 0.9, "alpha": 0.7, "nesterov": True},
    "ascent": {"lr": 0.02, "alpha": 0.3, "maximize": True, "weight_decay": 1e-2},
}


def assert_perturbs(params, dirs, kind, scope, rho=0.5):
    truth, plain, before = wide(params), copies(params), copies(params)
    rest = (None, rho, kind, scope, 1e-12)
    norm = reference.perturb_(truth, wide(dirs), copies(truth), *rest)
    plain_norm = reference.perturb_(plain, dirs, copies(params), *rest)
    saved = like(params)
    actual = KERNELS["perturb_"](params, dirs, saved, *rest)
    assert_matches(actual, norm, baseline=plain_norm)
    assert same_bits(saved, before)
    for i, param in enumerate(params):
        scale = before[i].double().abs() + (truth[i] - before[i].double()).abs()
        assert_matches(param, truth[i], baseline=plain[i], scale=scale)
        assert param._base is None or around(param).isnan().all()
        assert saved[i]._base is None or around(saved[i]).isnan().all()
    again = copies(before)
    given = KERNELS["perturb_"](again, dirs, saved, actual, *rest[1:])
    assert given.data_ptr() != actual.data_ptr() or actual.numel() == 0
    assert same_bits([*again, given], [*params, actual])


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("kind", ["sam", "asam", "path"])
@pytest.mark.parametrize(("name", "dtype"), [*CASES, ("empty_all", torch.float32)])
def test_perturb(name, dtype, kind, scope):
    if name not in ("odd", "empty_all") and (kind, scope) not in (("asam", "tensor"), ("path", "global")):
        return
    params = scene(name, dtype)
    assert_perturbs(params, like(params, size=0.3), kind, scope)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("kind", ["sam", "asam", "path"])
def test_norms_that_move_nothing(kind, scope):
    params = [torch.tensor([1.0, -0.0, 2.0]), torch.ones(2)]
    dirs = copies(params) if kind == "path" else [torch.zeros_like(x) for x in params]
    before, saved = copies(params), like(params)
    assert not KERNELS["perturb_"](params, dirs, saved, None, 1.0, kind, scope, 1e-12).any()
    assert same_bits([*params, *saved], [*before, *before])
    for bad in (math.nan, math.inf):
        params, dirs = [torch.ones(3), torch.ones(2)], [torch.full((3,), bad), torch.full((2,), 2.0)]
        saved = [torch.zeros_like(x) for x in params]
        norms = KERNELS["perturb_"](params, dirs, saved, None, 1.0, kind, scope, 1e-12)
        assert norms.isfinite().tolist() == ([False, True] if scope == "tensor" else False)
        assert all(bool((x == 1).all()) for x in (params[0], *saved))
        assert params[1].tolist() == pytest.approx([1 + 0.5**0.5 if scope == "tensor" else 1] * 2)


def sharp_lists(name, dtype, options, distance):
    saved = scene(name, dtype)
    return [
        [torch.full_like(x, math.nan) for x in saved],
        saved,
        like(saved, size=0.5, seed=2),
        like(saved, size=0.5, seed=3) if options.get("momentum") else [],
        like(saved, size=0.5, seed=4) if "alpha" in options else [],
        like(saved, seed=5) if distance else [],
    ]


def numbers(options):
    defaults = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0, "alpha": 1.0}
    given = {**defaults, "maximize": False, **options}
    return [given[k] for k in ("lr", "momentum", "dampening", "nesterov", "weight_decay", "alpha", "maximize")]


@pytest.mark.parametrize("distance", [False, True])
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize(("name", "dtype"), [*CASES, ("empty_all", torch.float32)])
def test_sharp_step(name, dtype, case, distance):
    if name not in ("odd", "empty_all") and (case, distance) not in (("mixed", True), ("momentum", False)):
        return
    options = OPTIONS[case]
    lists = sharp_lists(name, dtype, options, distance)
    truth, plain, before = [wide(xs) for xs in lists], [copies(xs) for xs in lists], [copies(xs) for xs in lists]
    squared = reference.sharp_step_(*truth, *numbers(options))
    plain_squared = reference.sharp_step_(*plain, *numbers(options))
    actual = KERNELS["sharp_step_"](*lists, *numbers(options))
    assert_matches(actual, squared.double(), baseline=plain_squared)
    for i, weight in enumerate(before[1]):
        size = weight.double().abs() + before[2][i].double().abs() + 4
        for written in (0, 3) if lists[3] else (0,):
            x = lists[written][i]
            assert_matches(x, truth[written][i], baseline=plain[written][i], scale=size)
            assert x._base is None or around(x).isnan().all()
    for read in (1, 2, 4, 5):
        assert same_bits(lists[read], before[read])


def test_launches(launched):
    xs = [torch.randn(3, 5), torch.randn(0, 4), torch.randn(4, 300), torch.randn(7)]
    refs, neurons, one = changed_like(xs), torch.ones(14, dtype=torch.bool), torch.ones(())
    norm_kernels = {"measure_directions": 1, "add_pieces": 1, "step_along": 1}

    def during(call, *args):
        launched.clear()
        call(*args)
        return dict(launched)

    assert during(KERNELS["neuron_norms"], xs, refs, 1) == {"measure_rows": 1}
    assert during(KERNELS["neuron_norms"], [torch.ones(2, 20_000)], [], 1) == {"measure_rows": 1, "join_rows": 1}
    found = during(KERNELS["kth_largest_change"], xs, refs, neurons, 3)
    assert found == {"count_digits": 3, "finish": 1}
    assert during(KERNELS["zero_changed_"], copies(xs), xs, refs, neurons, one) == {"zero_rows": 1}
    assert during(KERNELS["scale_neurons_"], copies(xs), torch.rand(14)) == {"scale_rows": 1}
    for scope, norm in (("global", one), ("tensor", torch.ones(4))):
        lists = [copies(xs), refs, copies(xs)]
        assert during(KERNELS["perturb_"], *lists, None, 0.1, "sam", scope, 0.0) == norm_kernels
        assert during(KERNELS["perturb_"], *lists, norm, 0.1, "sam", scope, 0.0) == {"step_along": 1}
    step = numbers({"lr": 0.1})
    assert during(KERNELS["sharp_step_"], copies(xs), xs, refs, [], [], [], *step) == {"step_pieces": 1}
    both = {"step_pieces": 1, "add_pieces": 1}
    assert during(KERNELS["sharp_step_"], copies(xs), xs, refs, [], [], refs, *step) == both


def test_a_repeated_call_uploads_nothing(monkeypatch):
    made = []
    original = tables._make_table
    monkeypatch.setattr(tables, "_make_table", lambda *args: made.append(args) or original(*args))
    xs = tensor_list("ragged")
    refs = changed_like(xs)
    for _ in range(3):
        KERNELS["neuron_norms"](xs, refs, 1)
    assert len(made) == 1
    KERNELS["neuron_norms"](xs, [], 1)
    KERNELS["neuron_norms"]([x.view(-1, 1) for x in xs], refs, 1)  # other rows of the same memory
    assert len(made) == 3
    others = [torch.randn(1, 2) for _ in range(tables.KEPT_TABLES)]
    for x in others:
        KERNELS["neuron_norms"]([x], [], 1)
    assert len(tables._tables) == tables.KEPT_TABLES
    KERNELS["neuron_norms"](xs, refs, 1)  # forgotten by now
    assert len(made) == 4 + len(others)
