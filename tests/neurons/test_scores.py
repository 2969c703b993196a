import copy
import csv
import random
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

from bdfast.neurons.index import NeuronIndex
from bdfast.neurons.scores import NeuronScores, neuron_gradient_norm, neuron_weight_change


def scores_of(values, **kwargs):
    """Scores of a model of one or two linear layers, the last with three rows."""
    rows = len(values) - 3
    model = nn.Sequential(*([nn.Linear(1, rows, bias=False)] if rows else []), nn.Linear(max(rows, 1), 3))
    return NeuronScores(torch.tensor(values, dtype=torch.float32), NeuronIndex(model).layers)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(54, 5)
    )


def plain_neurons(model):
    """The weights of every neuron of `network`, as lists of numbers."""
    first, second, last = (model[i].weight.tolist() for i in (0, 2, 4))
    neurons = [[w for plane in row for line in plane for w in line] for row in first]
    for channel in range(6):
        group, column = divmod(channel, 3)
        neurons.append([w for i in (2 * group, 2 * group + 1) for line in second[i][column] for w in line])
    return neurons + last


def test_top_is_sorted_and_ties_go_to_the_earlier_neuron():
    scores = scores_of([1, 3, 2, 3, 0, 3, 2])
    top = [
        ("0.weight", 1, 3.0),
        ("0.weight", 3, 3.0),
        ("1.weight", 1, 3.0),
        ("0.weight", 2, 2.0),
        ("1.weight", 2, 2.0),
    ]
    assert scores.top(5) == top
    assert scores.top(0) == []
    assert len(scores.top(100)) == len(scores) == 7
    with pytest.raises(ValueError, match=r"top: k: expected 0 or more, got -1;"):
        scores.top(-1)


def test_top_of_many_ties_is_stable():
    values = random.Random(0).choices(range(5), k=5000)
    scores = scores_of(values)
    assert scores.ranking().tolist() == sorted(range(5000), key=lambda i: -values[i])


def test_ranking_with_decimals_ranks_the_printed_numbers():
    draw = random.Random(1)
    # Halves of 10^-4 that float32 holds exactly, and random numbers, many of which print alike; the large
    # ones show
    # whether the scaling to 10^4 itself rounds.
    values = [k / 32 for k in range(50)] + [draw.uniform(0, 0.01) for _ in range(2000)]
    values += [draw.uniform(500, 500.1) for _ in range(2000)]
    scores = scores_of(values)
    printed = [float(f"{value:.4f}") for value in scores.values.tolist()]
    assert scores.ranking(decimals=4).tolist() == sorted(range(len(values)), key=lambda i: printed[i], reverse=True)
    assert scores.ranking(decimals=4).tolist() != scores.ranking().tolist()


def plain_outliers(values, z):
    median = statistics.median_low(values)
    deviation = statistics.median_low([abs(value - median) for value in values])
    return [value - median > z * 1.4826 * deviation for value in values]


@pytest.mark.parametrize("count", [3, 10, 101])
def test_outliers_follow_the_median_absolute_deviation(count):
    draw = random.Random(count)
    for _ in range(30):
        values = [float(draw.randint(0, 20)) for _ in range(count - 1)] + [float(draw.randint(0, 200))]
        assert scores_of(values).outliers(2).tolist() == plain_outliers(values, 2)


def test_only_high_scores_are_outliers():
    values = [10.0, 11, 12, 13, 14, -100, 100]
    assert scores_of(values).outliers().tolist() == [False] * 6 + [True]


def test_outliers_without_spread():
    assert scores_of([2.0, 2, 2, 2, 2.5, 1]).outliers().tolist() == [False] * 4 + [True, False]
    assert not scores_of([2.0, 2, 2, 2]).outliers().any()
    assert not scores_of([0.0, 0, 0]).outliers(0).any()


@pytest.mark.parametrize("z", [-1, float("nan")])
def test_outliers_need_a_sensible_z(z):
    with pytest.raises(ValueError, match=r"outliers: z: expected 0 or more, got .*; 3.5"):
        scores_of([1, 2, 3]).outliers(z)


def test_by_layer_gives_views():
    scores = scores_of([1, 2, 3, 4, 5])
    parts = scores.by_layer()
    assert {name: part.tolist() for name, part in parts.items()} == {
        "0.weight": [1, 2],
        "1.weight": [3, 4, 5],
    }
    parts["1.weight"][0] = 9
    assert scores.values.tolist() == [1, 2, 9, 4, 5]


def test_to_csv_keeps_every_bit(tmp_path):
    scores = scores_of(torch.randn(40, generator=torch.Generator().manual_seed(0)).mul(1e-3).tolist())
    scores.to_csv(tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["parameter", "row", "value"]
    assert [(name, int(row)) for name, row, _ in lines] == [("0.weight", i) for i in range(37)] + [
        ("1.weight", i) for i in range(3)
    ]
    assert torch.equal(torch.tensor([float(value) for *_, value in lines]), scores.values)


def test_to_csv_replaces_the_file_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "scores.csv"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            scores_of([1, 2, 3]).to_csv(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("scores.csv", "old")]
    scores_of([1, 2, 3]).to_csv(str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["scores.csv"]
    assert path.read_text().splitlines()[1] == "0.weight,0,1"


def test_nan_scores_are_refused_and_the_layer_is_named():
    scores = scores_of([1, 2, 3, float("nan"), 5])
    for use in (lambda: scores.top(1), scores.outliers, scores.ranking):
        with pytest.raises(ValueError, match=r"values: expected numbers, got 1 NaN, .* row 1 of '1.weight';"):
            use()


def test_scores_must_fit_their_layers():
    layers = NeuronIndex(nn.Linear(2, 3)).layers
    for values in (torch.zeros(4), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match=r"values: expected shape \(3,\), one score per neuron .*, got "):
            NeuronScores(values, layers)


@pytest.mark.parametrize("ord", [1, 2, float("inf")])
def test_weight_change_is_the_norm_of_the_difference(ord):
    model, reference = network(), network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = [
        torch.linalg.vector_norm(torch.tensor(a).double() - torch.tensor(b).double(), ord)
        for a, b in zip(plain_neurons(model), plain_neurons(reference), strict=True)
    ]
    for source in (reference, reference.state_dict()):
        scores = neuron_weight_change(model, source, ord=ord)
        assert scores.values.dtype == torch.float32
        torch.testing.assert_close(scores.values, torch.stack(expected).float(), rtol=1e-6, atol=0)


def test_weight_change_of_selected_neurons_and_of_state_dicts():
    model, reference = network(), network()
    with torch.no_grad():
        model[4].weight[3, 7] += 5
    index = NeuronIndex(model, include="4")
    scores = neuron_weight_change(model.state_dict(), reference.state_dict(), index=index)
    assert (len(scores), scores.top(1)[0][:2]) == (5, ("4.weight", 3))
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, .*, got a OrderedDict;"):
        neuron_weight_change(model.state_dict(), reference)


def test_weight_change_pairs_weights_of_different_memory_formats():
    model, reference = network(), network()
    with torch.no_grad():
        model[0].weight[1, 0, 1, 1] += 1
    expected = neuron_weight_change(model, reference).values
    assert (expected != 0).sum() == 1
    for a, b in ((True, False), (False, True), (True, True)):
        first, second = copy.deepcopy(model), copy.deepcopy(reference)
        for chosen, source in ((a, first), (b, second)):
            if chosen:
                source.to(memory_format=torch.channels_last)
        torch.testing.assert_close(neuron_weight_change(first, second).values, expected, rtol=1e-6, atol=0)


def test_weight_change_names_what_does_not_fit():
    model, reference = network(), network().bfloat16()
    with pytest.raises(ValueError, match=r"reference\['0.weight'\]: expected torch.float32 .*, got torch.bfloat16"):
        neuron_weight_change(model, reference)
    with pytest.raises(ValueError, match=r"reference\['2.weight'\]: expected .*, got none;"):
        neuron_weight_change(model, model[:2])


@pytest.mark.parametrize("ord", [1, 2, float("inf")])
def test_gradient_norm_is_the_norm_of_the_gradient(ord):
    model = network()
    model(torch.randn(3, 2, 3, 3)).square().sum().backward()
    gradients = copy.deepcopy(model)
    for copied, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
        copied.data = parameter.grad
    expected = [torch.linalg.vector_norm(torch.tensor(row).double(), ord) for row in plain_neurons(gradients)]
    scores = neuron_gradient_norm(model, ord=ord)
    torch.testing.assert_close(scores.values, torch.stack(expected).float(), rtol=1e-6, atol=0)


def test_a_missing_gradient_scores_zero():
    model = network()
    model[2].weight.requires_grad_(False)
    model(torch.randn(3, 2, 3, 3)).square().sum().backward()
    complete = neuron_gradient_norm(model, index=NeuronIndex(model, exclude="2")).by_layer()
    parts = neuron_gradient_norm(model).by_layer()
    assert not parts["2.weight"].any()
    for name in ("0.weight", "4.weight"):
        assert parts[name].all()
        assert torch.equal(parts[name], complete[name])


def test_gradient_norm_needs_a_gradient():
    model = network()
    model(torch.randn(3, 2, 3, 3)).sum().backward()
    model.zero_grad()
    with pytest.raises(
        ValueError,
        match=r"model: expected a gradient .* of the 3 parameters .*, got none; call loss",
    ):
        neuron_gradient_norm(model)


def test_sparse_gradients_count():
    dense, sparse = nn.Embedding(5, 3), nn.Embedding(5, 3, sparse=True)
    sparse.load_state_dict(dense.state_dict())
    for model in (dense, sparse):
        model(torch.tensor([1, 1, 3])).square().sum().backward()
    values = neuron_gradient_norm(sparse).values
    assert torch.equal(values, neuron_gradient_norm(dense).values)
    assert values.nonzero().flatten().tolist() == [1, 3]


def test_a_non_finite_gradient_stays_in_its_neuron():
    model = nn.Linear(2, 3)
    model.weight.grad = torch.tensor([[1.0, 2], [float("nan"), 0], [float("inf"), 1]])
    values = neuron_gradient_norm(model).values
    assert values[0] == 3
    assert values[1].isnan()
    assert values[2].isinf()
