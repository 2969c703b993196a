import copy
import random

import pytest
import torch
from torch import nn

from bdfast.neurons.index import NeuronIndex
from bdfast.neurons.reinitialization import prune_neurons, reinitialize
from bdfast.neurons.scores import NeuronScores, neuron_weight_change

# Weights are whole multiples of this, few enough for the eight significant bits of bfloat16: sums are exact,
# changes tie often, and neuron weight changes that differ are often alike to four decimals.
STEP = 2.0**-16


def network(seed, dtype, largest):
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Linear(7, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            whole = torch.randint(-largest, largest + 1, parameter.shape, generator=draw)
            parameter.copy_(whole * STEP)
    return model.to(dtype)


def models(seed, dtype):
    original, change = network(seed, dtype, 60), network(seed + 10_000, dtype, 4)
    unlearned = copy.deepcopy(original)
    with torch.no_grad():
        for parameter, step in zip(unlearned.parameters(), change.parameters(), strict=True):
            parameter.add_(step)
    return unlearned, original


def plain_places():
    """For every neuron of `network`, the (parameter, index) of each of its sub-weights."""
    neurons = []
    for out in range(5):
        neurons.append([("0.weight", (out, i, h, w)) for i in range(3) for h in range(2) for w in range(2)])
    for out in range(6):
        group, column = out // 3, out % 3
        inputs = (2 * group, 2 * group + 1)
        neurons.append([("1.weight", (i, column, h, w)) for i in inputs for h in range(2) for w in range(2)])
    for out in range(8):
        neurons.append([("2.weight", (out, i)) for i in range(7)])
    return neurons


def plain_reinitialize(unlearned, original, n, m, official):
    """The method in lists and loops, as the published code has it: weights, mask, threshold, count."""
    places = plain_places()
    after, before = unlearned.state_dict(), original.state_dict()
    changes = [[abs(after[name][at].item() - before[name][at].item()) for name, at in row] for row in places]
    scores = [sum(row) for row in changes]
    if official:
        scores = [float(f"{score:.4f}") for score in scores]
    ranking = sorted(range(len(scores)), key=lambda neuron: scores[neuron], reverse=True)
    selected = ranking[: max(1, int(n * len(scores)))]
    pool = sorted((change for neuron in selected for change in changes[neuron]), reverse=True)
    threshold = pool[max(1, int(len(pool) * m)) - 1]
    if not official:  # what has not changed stays
        threshold = max(threshold, torch.finfo(torch.float32).tiny)
    weights = {name: value.clone() for name, value in before.items()}
    zeroed = 0
    for neuron in selected:
        for (name, place), change in zip(places[neuron], changes[neuron], strict=True):
            if change >= threshold:
                weights[name][place] = 0
                zeroed += 1
    return weights, [neuron in selected for neuron in range(len(scores))], threshold, zeroed


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reinitialize_equals_a_plain_implementation(dtype, compat):
    ties = rankings_differ = 0
    for seed in range(100):
        draw = random.Random(seed)
        n, m = draw.choice([0.01, 0.1, 0.15, 0.29, 0.5, 0.9, 1.0]), draw.choice([0.001, 0.3, 0.57, 0.7, 1.0])
        unlearned, original = models(seed, dtype)
        model = copy.deepcopy(original)
        scores = neuron_weight_change(unlearned, original)
        done = reinitialize(model, scores, n=n, m=m, changed=(unlearned, original), compat=compat)

        weights, mask, threshold, zeroed = plain_reinitialize(unlearned, original, n, m, compat == "official")
        assert done.neurons.tolist() == mask
        assert (done.threshold, done.zeroed) == (threshold, zeroed)
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name]), name

        ties += zeroed > max(1, int(sum(len(p) for p, chosen in zip(plain_places(), mask, strict=True) if chosen) * m))
        rankings_differ += mask != plain_reinitialize(unlearned, original, n, m, compat is None)[1]
    # The comparison is worth something only if the hard cases occur.
    assert ties > 50
    assert rankings_differ > 0


def test_reinitialize_takes_at_least_one_neuron_and_one_sub_weight():
    unlearned, original = models(0, torch.float32)
    with torch.no_grad():
        unlearned[2].weight[3, 5] += 100
    model = copy.deepcopy(original)
    done = reinitialize(model, neuron_weight_change(unlearned, original), n=1e-9, m=1e-9, changed=(unlearned, original))
    assert (int(done.neurons.sum()), done.zeroed) == (1, 1)
    assert model[2].weight[3, 5] == 0


def test_shares_are_cut_as_in_the_published_code():
    reference, changed = nn.Linear(1, 100), nn.Linear(1, 100)
    scores = neuron_weight_change(changed, reference)
    # 0.29 * 100 is 28.999999999999996.
    done = reinitialize(copy.deepcopy(reference), scores, n=0.29, m=1.0, changed=(changed, reference))
    assert int(done.neurons.sum()) == done.zeroed == 28


def test_reinitialize_takes_state_dicts_and_any_scores():
    original = models(1, torch.float32)[1]
    unlearned = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in unlearned.parameters():
            parameter.add_(1.0)  # every sub-weight changes
    index = NeuronIndex(original, kinds="conv")
    scores = NeuronScores(torch.arange(11.0), index.layers)
    state = copy.deepcopy(original.state_dict())
    done = reinitialize(state, scores, n=0.5, m=1.0, changed=(unlearned.state_dict(), original.state_dict()))
    assert done.neurons.nonzero().flatten().tolist() == [6, 7, 8, 9, 10]
    assert not state["1.weight"][2:].any()
    assert not state["1.weight"][:2, 1:].any()
    assert torch.equal(state["1.weight"][:2, 0], original[1].weight[:2, 0])
    for name in ("0.weight", "0.bias", "1.bias", "2.weight", "2.bias"):
        assert torch.equal(state[name], original.state_dict()[name])


def test_reinitialize_may_write_into_the_original():
    unlearned, original = models(2, torch.float32)
    scores = neuron_weight_change(unlearned, original)
    model = copy.deepcopy(original)
    apart = reinitialize(model, scores, n=0.5, m=0.5, changed=(unlearned, original))
    same = reinitialize(original, scores, n=0.5, m=0.5, changed=(unlearned, original))
    assert (same.threshold, same.zeroed) == (apart.threshold, apart.zeroed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_reinitialize_pairs_models_of_different_memory_formats():
    unlearned, original = models(3, torch.float32)
    scores = neuron_weight_change(unlearned, original)
    expected, model = copy.deepcopy(original), copy.deepcopy(original).to(memory_format=torch.channels_last)
    reinitialize(expected, scores, n=0.5, m=0.5, changed=(unlearned, original))
    reinitialize(model, scores, n=0.5, m=0.5, changed=(unlearned, original))
    assert not model[0].weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("name", ["n", "m"])
@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan")])
def test_a_share_outside_its_range_changes_nothing(name, share):
    assert_refused({name: share}, ValueError, rf"reinitialize: {name}: expected a share in \(0, 1\], got {share};")


def test_arguments_of_a_wrong_kind_change_nothing():
    assert_refused({"compat": "paper"}, ValueError, "compat: expected None or \"official\", got 'paper';")
    assert_refused(
        {"changed": nn.Linear(1, 1)},
        TypeError,
        r"changed: expected two .*, got a Linear; .*=\(unlearned,",
    )
    assert_refused({"scores": torch.zeros(19)}, TypeError, "scores: expected NeuronScores, got a Tensor; pass")


def assert_refused(wrong, error, message):
    unlearned, original = models(4, torch.float32)
    model = copy.deepcopy(original)
    right = {"n": 0.5, "m": 0.5, "scores": neuron_weight_change(unlearned, original)}
    with pytest.raises(error, match=message):
        reinitialize(model, **{**right, "changed": (unlearned, original), **wrong})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_wrong_models_change_nothing():
    unlearned, original = models(5, torch.float32)
    model = copy.deepcopy(original)
    scores = neuron_weight_change(unlearned, original)
    with pytest.raises(ValueError, match=r"changed\[1\]\['0.weight'\]: expected .* like model.*, got torch.bfloat16"):
        reinitialize(model, scores, n=1, m=1, changed=(unlearned, copy.deepcopy(original).bfloat16()))
    with pytest.raises(ValueError, match=r"changed\[0\]\['2.weight'\]: expected .*, got none;"):
        reinitialize(model, scores, n=1, m=1, changed=(unlearned[:2], original))
    with torch.no_grad():
        unlearned[1].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"changed: expected .*, got NaN .*; unlearning has diverged"):
        reinitialize(model, scores, n=1, m=0.01, changed=(unlearned, original))
    with pytest.raises(ValueError, match=r"1 NaN, the first for row 0 of '1.weight'"):
        reinitialize(model, neuron_weight_change(unlearned, original), n=1, m=1, changed=(unlearned, original))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_prune_neurons_zeroes_whole_neurons_and_nothing_else():
    _, original = models(6, torch.float32)
    model = copy.deepcopy(original)
    mask = torch.zeros(19, dtype=torch.bool)
    mask[[1, 9, 18]] = True
    prune_neurons(model, mask)
    expected = original.state_dict()
    for neuron in (1, 9, 18):
        for name, place in plain_places()[neuron]:
            expected[name][place] = 0
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_prune_neurons_takes_a_mask_of_scores():
    unlearned, original = models(7, torch.float32)
    with torch.no_grad():
        unlearned[1].weight[:2, 2] += 50
    scores = neuron_weight_change(unlearned, original, index=NeuronIndex(original, kinds="conv"))
    state = copy.deepcopy(original.state_dict())
    prune_neurons(state, scores.outliers(), index=scores.index)
    assert not state["1.weight"][:2, 2].any()
    assert (
        state["1.weight"].count_nonzero()
        == original[1].weight.count_nonzero() - original[1].weight[:2, 2].count_nonzero()
    )


@pytest.mark.parametrize(
    "mask", [torch.zeros(19), torch.zeros(18, dtype=torch.bool), torch.ones(1, 19, dtype=torch.bool)]
)
def test_a_wrong_mask_prunes_nothing(mask):
    _, original = models(8, torch.float32)
    model = copy.deepcopy(original)
    with pytest.raises(ValueError, match=r"mask: expected torch.bool of shape \(19,\), .*, got torch.*; pass index="):
        prune_neurons(model, mask)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_autograd_notices_that_weights_were_changed():
    model = nn.Linear(3, 2)
    out = model(torch.randn(1, 3, requires_grad=True)).sum()
    prune_neurons(model, torch.tensor([True, False]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_scores_are_no_mask():
    unlearned, original = models(9, torch.float32)
    with pytest.raises(TypeError, match=r"mask: expected a bool tensor, got a NeuronScores; pass scores.outliers\(\)"):
        prune_neurons(original, neuron_weight_change(unlearned, original))
