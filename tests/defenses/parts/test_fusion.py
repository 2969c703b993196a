"""The fusion of OTBR: the published code and our form against plain transcriptions in float64."""

import copy

import numpy as np
import pytest
import torch
from convolution_chain import Chain
from published_runs import batches
from torch import nn
from torch.nn import functional as F

import bdfast
from bdfast.defenses.otbr import OTBRDefense
from bdfast.defenses.parts.channel_spaces import traced
from bdfast.defenses.parts.fusion import LEAST, TIE, _costs, fuse
from bdfast.defenses.parts.noise import Noise
from bdfast.neurons import NeuronIndex, NeuronScores, prune_neurons

ot = pytest.importorskip("ot")


def plan(first: torch.Tensor, second: torch.Tensor, beta: torch.Tensor, before: torch.Tensor, tie: float):
    """Exact transport between rows, costs one by one; `before` are the rows of the given network."""
    cost = torch.zeros(len(first), len(second), dtype=torch.float64)
    for i, row in enumerate(first):
        for j, other in enumerate(second):
            cost[i, j] = (row - other).square().sum().sqrt()
            if not torch.equal(row, before[i]):
                cost[i, j] += tie * (before[i] - other).square().sum().sqrt()
    return cost, np.full(len(first), 1 / len(first)), beta.numpy()


def published(model: Chain, gamma: float, lam: float, lr: float, steps: int, size: int) -> Chain:
    """The published code, but for the floor of what a neuron receives."""
    unlearned = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(unlearned.parameters(), lr=lr, momentum=0.9)
    noise = Noise((2, 8, 8), 4 - 1, steps * size, seed=0)
    for images, labels in batches(noise, size, 1, "unlearn"):
        optimizer.zero_grad()
        (-F.cross_entropy(unlearned(images.double()), labels)).backward()
        optimizer.step()
    names = [name for name, x in model.named_parameters() if x.dim() == 4 and "shortcut" not in name]
    given, changed = model.state_dict(), unlearned.state_dict()
    nwc = []
    for name in names:
        for i in range(len(given[name])):
            nwc.append((name, i, round(float((changed[name][i] - given[name][i]).abs().sum()), 4)))
    ranked = sorted(nwc, key=lambda entry: entry[2], reverse=True)[: int(gamma * len(nwc))]
    pruned, fused = copy.deepcopy(model), copy.deepcopy(model)
    for name, i, _ in ranked:
        dict(pruned.named_parameters())[name].data[i] = 0
    first = min(names.index(name) for name, _, _ in ranked)
    transport, beta = None, None
    for name in names[first:]:
        w1, w2 = dict(pruned.named_parameters())[name].data, given[name].data
        o, i, k, _ = w1.shape
        aligned = w1.reshape(o, i, k * k).clone()
        if transport is not None:
            for s in range(k * k):
                aligned[:, :, s] = aligned[:, :, s] @ transport @ torch.diag(1 / beta)
        scores = torch.tensor([value for owner, _, value in nwc if owner == name], dtype=torch.float64)
        scores = scores.clamp(min=LEAST * scores.sum())
        beta = scores / scores.sum()
        cost, alpha, to = plan(w1.flatten(1), w2.flatten(1), beta, w2.flatten(1), 0.0)
        transport = torch.from_numpy(ot.emd(alpha, to, cost.numpy()))
        new = torch.diag(1 / beta) @ transport.T @ aligned.flatten(1)
        dict(fused.named_parameters())[name].data = lam * new.view_as(w2) + (1 - lam) * w2
    return fused


@pytest.mark.parametrize("gamma", [0.1, 0.3])
def test_official_is_the_published_code(gamma):
    torch.manual_seed(0)
    model = Chain().double().eval()
    model.bn1.running_mean.normal_()
    expected = published(model, gamma, lam=0.3, lr=0.05, steps=3, size=8)
    options = {"gamma": gamma, "fusion": 0.3, "unlearn_lr": 0.05, "unlearn_steps": 3, "unlearn_batch": 8}
    method = OTBRDefense(compat="official", image_shape=(2, 8, 8), **options)
    result = bdfast.purify(model, None, method=method, amp=False)
    for name, x in expected.state_dict().items():
        torch.testing.assert_close(result.model.state_dict()[name], x, rtol=0, atol=1e-9)
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, result.model.state_dict()[name])}
    assert "conv3.weight" in moved <= {"conv1.weight", "conv2.weight", "conv3.weight"}
    assert int(result.neurons.sum()) == int(gamma * 23)


def fusion(model: nn.Module, hit: list[int], shape=(2, 8, 8), seed: int = 1, **options) -> tuple[nn.Module, dict]:
    """The fused network, with scores as drawn and `hit` pruned, and what it was made of."""
    index = NeuronIndex.in_scope(model)
    x = torch.rand(2, *shape, dtype=torch.float64)
    links = traced(model, NeuronIndex(model, kinds=("conv", "linear")), lambda: model(x), x).links
    values = torch.rand(len(index), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.05
    scores = options.pop("scores", None) or NeuronScores(values, index.layers)
    neurons = torch.zeros(len(index), dtype=torch.bool)
    neurons[hit] = True
    pruned, fused = copy.deepcopy(model), copy.deepcopy(model)
    prune_neurons(pruned, neurons, index=index)
    links = options.pop("links", links)
    aligned = fuse(fused, pruned, scores, neurons, links, share=options.pop("share", 0.4), **options)
    return fused, {"pruned": pruned, "scores": scores, "aligned": aligned, "links": links}


def test_our_form_is_its_formula():
    """conv2 and the shortcut share a plan; conv3 and the classifier read what was moved."""
    torch.manual_seed(0)
    model = Chain().double().eval()
    # Two of conv1, one of conv2, none of the others. Neurons of the shortcut have no number.
    fused, made = fusion(model, [1, 4, 8])
    assert made["aligned"] == 5
    changes = made["scores"].by_layer()
    spaces = {"a": ["conv1"], "b": ["conv2", "shortcut"], "c": ["conv3"]}
    transports = {}
    for space, writers in spaces.items():
        beta = changes[f"{writers[0]}.weight"] / changes[f"{writers[0]}.weight"].sum()
        total = 0
        for writer in writers:
            w1, w2 = (getattr(x, writer).weight.data.flatten(1) for x in (made["pruned"], model))
            cost, alpha, to = plan(w1, w2, beta, w2, TIE)
            total = total + cost
        transports[space] = torch.from_numpy(ot.emd(alpha, to, total.numpy())) / beta
    stands = {"conv1": (None, "a"), "conv2": ("a", "b"), "shortcut": ("a", "b"), "conv3": ("b", "c")}
    for layer, (source, space) in {**stands, "linear": ("c", None)}.items():
        w1, w2 = getattr(made["pruned"], layer).weight.data, getattr(model, layer).weight.data
        if source is not None:
            w1 = torch.einsum("oi...,ij->oj...", w1, transports[source])
        if space is not None:
            w1 = torch.einsum("ij,i...->j...", transports[space], w1)
        assert (w1 - w2).abs().max() > 0.01, layer
        torch.testing.assert_close(getattr(fused, layer).weight.data, 0.4 * w1 + 0.6 * w2, rtol=0, atol=1e-9)
    for name in ("bn1.weight", "linear.bias", "bn2.running_var"):
        assert torch.equal(fused.state_dict()[name], model.state_dict()[name])


def test_nothing_before_the_first_pruned_layer_moves():
    model = Chain().double().eval()
    fused, _ = fusion(model, [15])  # the second of conv3
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, fused.state_dict()[name])}
    assert moved == {"conv3.weight", "linear.weight"}


def test_a_space_that_earlier_layers_write_to_keeps_its_order():
    class Late(Chain):
        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = self.shortcut(x) + self.bn2(self.conv2(x))  # the shortcut comes first, and has no pruned neuron
            return self.linear(self.conv3(x).mean((2, 3)))

    model = Late().double().eval()
    fused, made = fusion(model, [7])
    assert made["aligned"] == 2  # conv3 and the classifier
    assert torch.equal(fused.conv1.weight, model.conv1.weight)
    assert torch.equal(fused.shortcut.weight, model.shortcut.weight)
    expected = (0.4 * made["pruned"].conv2.weight + 0.6 * model.conv2.weight).data
    torch.testing.assert_close(fused.conv2.weight.data, expected, rtol=0, atol=1e-12)


def test_a_depthwise_convolution_goes_along_the_plan_of_the_one_before_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 6), nn.Flatten())
    model = model.double().eval()
    fused, made = fusion(model, [2, 7])
    beta = made["scores"].by_layer()["0.weight"] / made["scores"].by_layer()["0.weight"].sum()
    w1, w2 = made["pruned"][0].weight.data.flatten(1), model[0].weight.data.flatten(1)
    cost, alpha, to = plan(w1, w2, beta, w2, TIE)
    transport = torch.from_numpy(ot.emd(alpha, to, cost.numpy())) / beta
    expected = 0.4 * torch.einsum("ij,iabc->jabc", transport, made["pruned"][2].weight.data) + 0.6 * model[2].weight
    torch.testing.assert_close(fused[2].weight.data, expected.data, rtol=0, atol=1e-9)


def test_what_was_not_pruned_costs_nothing_where_it_is():
    given = 1e3 * torch.rand(30, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pruned = given.clone()
    pruned[4] = 0
    costs = _costs(pruned, given, 0.0)
    assert [i for i in range(30) if costs[i, i] != 0] == [4]
    torch.testing.assert_close(costs, (pruned[:, None] - given).norm(dim=2), rtol=1e-9, atol=1e-9)


def test_without_spaces_it_is_the_mean_of_both():
    model = Chain().double().eval()
    fused, made = fusion(model, [1, 8, 15], links=[], share=0.3)
    for name, x in model.named_parameters():
        expected = 0.3 * made["pruned"].get_parameter(name) + 0.7 * x
        torch.testing.assert_close(fused.get_parameter(name), expected, rtol=0, atol=1e-12)
    assert made["aligned"] == 0
    assert torch.equal(fused.conv1.weight[0], model.conv1.weight[0])
    fused, _ = fusion(model, [1, 8, 15], share=0.0)
    assert all(torch.equal(x, fused.get_parameter(name)) for name, x in model.named_parameters())


@pytest.mark.parametrize("pruned", [[1], [0, 1, 4, 7, 8, 14, 15, 20]])
def test_the_order_of_hidden_channels_does_not_matter(pruned):
    """Also where several pruned neurons of a layer are alike, so that plans cost the same."""

    def chain() -> nn.Sequential:
        layers = [nn.Conv2d(2, 7, 3), nn.ReLU(), nn.Conv2d(7, 8, 3), nn.ReLU(), nn.Conv2d(8, 9, 3), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(36, 4)).double().eval()

    torch.manual_seed(0)
    model, other = chain(), chain()
    orders = [torch.randperm(n) for n in (7, 8, 9)]
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for place, order in zip((0, 2, 4), orders, strict=True):
            other[place].weight.copy_(other[place].weight[order].clone())
            other[place].bias.copy_(other[place].bias[order])
        for place, order in zip((2, 4), orders, strict=False):
            other[place].weight.copy_(other[place].weight[:, order].clone())
        other[6].weight.copy_(other[6].weight.view(4, 9, 4)[:, orders[2]].reshape(4, 36))
    fused, made = fusion(model, pruned)
    flat = torch.cat([orders[0], 7 + orders[1], 15 + orders[2]])
    scores = NeuronScores(made["scores"].values[flat], made["scores"].layers)
    places = [int((flat == neuron).nonzero()) for neuron in pruned]
    refused, _ = fusion(other, places, scores=scores)
    x = torch.rand(5, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(refused(x), fused(x), rtol=0, atol=1e-12)
    assert (fused(x) - model(x)).abs().max() > 1e-3


def test_a_space_whose_neurons_did_not_change_keeps_its_order():
    model = Chain().double().eval()
    index = NeuronIndex.in_scope(model)
    values = torch.zeros(len(index))
    values[:6] = torch.rand(6) + 0.1
    _, made = fusion(model, [1], scores=NeuronScores(values, index.layers))
    assert made["aligned"] == 3  # conv1, and the two that read it
