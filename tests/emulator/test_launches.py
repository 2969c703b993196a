"""How many launches an op takes, what stays on the device, and what happens to the plans that were uploaded."""

import math

import pytest
import torch

from bdfast.ops import reference
from bdfast.testing import assert_matches, changed_like, neuron_mask, tensor_list

LONG = 70_000  # columns: more than the kLongestRow of csrc/cuda/plan.h


@pytest.fixture
def lists():
    """ResNet-18 in small, thus 62 tensors."""
    first = tensor_list("resnet18")
    return first, *(changed_like(first, seed=seed) for seed in (1, 2, 3))


def launches(emulated, call):
    emulated.take_launches()
    call()
    return emulated.take_launches()


def test_launches(emulated, lists):
    a, b, c, d = lists
    neurons, tau = neuron_mask(a), torch.tensor(0.1)
    sgd = (0.1, 0.9, 0.0, False, 0.0, 0.7, False)
    expected = {
        1: (
            lambda: emulated.neuron_norms(a, b, 1.0),
            lambda: emulated.zero_changed_(c, a, b, neurons, tau),
            lambda: emulated.scale_neurons_(c, torch.full((len(neurons),), 0.5)),
            lambda: emulated.sharp_step_(a, b, c, d, c, [], *sgd),
            lambda: emulated.perturb_(a, b, c, torch.tensor(1.0), 0.1, "sam", "global", 0.0),
        ),
        2: (lambda: emulated.sharp_step_(a, b, c, d, [], b, *sgd),),
        3: (
            lambda: emulated.perturb_(a, b, c, None, 0.1, "sam", "global", 0.0),
            lambda: emulated.perturb_(a, b, c, None, 0.1, "asam", "tensor", 0.0),
        ),
        4: (lambda: emulated.kth_largest_change(a, b, neurons, 100),),
    }
    for count, calls in expected.items():
        assert [launches(emulated, call) for call in calls] == [count] * len(calls)


@pytest.mark.parametrize("ord", [1.0, 2.0, math.inf])
def test_a_row_of_several_blocks(emulated, ord):
    xs = [torch.randn(3, LONG, generator=torch.Generator().manual_seed(0)), torch.ones(2, 5)]
    xs[0][1, LONG - 1] = math.nan
    wide = [x.double() for x in xs]
    norms = None

    def call():
        nonlocal norms
        norms = emulated.neuron_norms(xs, [], ord)

    assert launches(emulated, call) == 2
    assert_matches(norms, reference.neuron_norms(wide, [], ord), baseline=reference.neuron_norms(xs, [], ord))


def test_too_large_a_q_is_nan(emulated):
    xs, refs = [torch.ones(2, 3)], [torch.zeros(2, 3)]
    neurons = torch.tensor([True, False])
    assert emulated.kth_largest_change(xs, refs, neurons, 3) == 1
    assert emulated.kth_largest_change(xs, refs, neurons, 4).isnan()


def test_a_plan_is_uploaded_once(emulated, lists):
    a, b, *_ = lists
    emulated.neuron_norms(a, b, 1.0)
    uploads = emulated.library.emulator_uploads()
    emulated.neuron_norms(a, b, 2.0)
    emulated.scale_neurons_(a, torch.ones(sum(len(x) for x in a)))
    assert emulated.library.emulator_uploads() == uploads + 1  # scale_neurons_ has another list
    emulated.neuron_norms(b, a, 1.0)
    assert emulated.library.emulator_uploads() == uploads + 2


def test_plans_of_graphs_stay_and_others_are_dropped(emulated):
    captured, others = torch.ones(4, 5), torch.ones(600, 4)
    emulated.neuron_norms([captured], [], 1.0)
    emulated.library.emulator_set_capturing(1)
    try:
        assert emulated.neuron_norms([captured], [], 1.0).tolist() == [5.0] * 4
        with pytest.raises(RuntimeError, match="run the call once with the same tensors before capturing it"):
            emulated.neuron_norms([torch.ones(3, 7)], [], 1.0)
    finally:
        emulated.library.emulator_set_capturing(0)
    for row in others:
        emulated.neuron_norms([row], [], 1.0)
    assert emulated.library.emulator_allocated() <= 257
    uploads = emulated.library.emulator_uploads()
    emulated.neuron_norms([captured], [], 1.0)
    assert emulated.library.emulator_uploads() == uploads
