"""Fine-pruning: its ranking, the number of features and the mask, against plain transcriptions in float64."""

import copy
import math

import pytest
import torch
from published_runs import assert_same, batches
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast import task
from bdfast.data.batches import Batches
from bdfast.defenses.fine_pruning import RANKED_ON, FinePruningDefense, pruned_hits
from bdfast.defenses.parts.activations import features_into, mean_activations
from bdfast.models import SmallVGG, SmallViT
from bdfast.training import Run
from bdfast.training.seeds import derived_seed, seeded

BATCH = 8


def images(count: int = 60, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (count,), generator=generator)
    pixels = torch.rand(count, 1, 4, 4, dtype=dtype, generator=generator)
    pixels[torch.arange(count), 0, labels] += 0.7
    return TensorDataset(pixels, labels)


def network(last: nn.Module | None = None) -> nn.Sequential:
    """It knows the images: a bright pixel says the class. `last` is in the place of the ReLU before 144 features."""
    with seeded(0, torch.device("cpu")):
        model = nn.Sequential(
            nn.Conv2d(1, 9, 3, padding=1),
            nn.BatchNorm2d(9),
            nn.ReLU() if last is None else last,
            nn.Flatten(),
            nn.Linear(144, 3),
        ).double()
        pixels, labels = images().tensors
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
    model.zero_grad()
    return model.eval()


def batched(data: TensorDataset) -> Batches:
    return Batches(data, device="cpu", batch_size=BATCH)


def purified(model: nn.Module, data: TensorDataset, **options) -> bdfast.PurifyResult:
    settings = {**FinePruningDefense.PUBLISHED, **options}
    about = {name: settings.pop(name) for name in ("batch_size", "amp", "augment")}
    about |= {"batch_size": BATCH, "augment": None}
    return bdfast.purify(model, data, method=FinePruningDefense(**settings), **about)


def activity(model: nn.Sequential, pixels: torch.Tensor) -> list[float]:
    """Of every feature, image by image."""
    totals = [0.0] * 144
    with torch.no_grad():
        for image in pixels:
            for index, value in enumerate(model[:-1](image[None])[0].tolist()):
                totals[index] += abs(value)
    return [total / len(pixels) for total in totals]


def accuracy(model: nn.Module, data: TensorDataset, columns: list[int]) -> float:
    """Of the whole network, without these columns."""
    pruned = copy.deepcopy(model).eval()
    with torch.no_grad():
        for column in columns:
            pruned[-1].weight[:, column] = 0
        return float((pruned(data.tensors[0]).argmax(1) == data.tensors[1]).double().mean())


def expected_columns(model: nn.Sequential, data: TensorDataset, max_drop: float) -> list[int]:
    """Two features a step, as 144 are 1.44 to a hundredth."""
    parts = batched(data).split(RANKED_ON, derived_seed(0, "pruning"))
    ranking, held_out = (TensorDataset(*map(torch.cat, zip(*part.ordered(), strict=True))) for part in parts)
    means = activity(model, ranking.tensors[0])
    order = sorted(range(144), key=lambda index: means[index])
    before, columns = accuracy(model, held_out, []), []
    for count in range(2, 144, 2):
        if (before - accuracy(model, held_out, order[:count])) / before >= max_drop:
            break
        columns = order[:count]
    return columns


@pytest.mark.parametrize("last", [None, nn.Identity()])
@pytest.mark.parametrize("max_drop", [0.05, 0.1, 0.4, 1.0])
def test_the_number_of_features(max_drop, last):
    """One below zero counts by how far it is from there."""
    model, data = network(last), images()
    expected = expected_columns(model, data, max_drop)
    assert 0 < len(expected) < 144
    actual = FinePruningDefense(max_pruning_drop=max_drop)._chosen(model, "4", batched(data), Run(amp=False))
    assert actual.nonzero().flatten().tolist() == sorted(expected)


def test_a_drop_of_just_the_budget_is_too_much():
    """And what comes after it does not count, however right it is."""
    layer = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]]))
    # Without feature 1 every second image is wrong, and without 2 right again. Their means rise from 0 to 3.
    features = torch.tensor([[0.1, 0, 0, 2], [0.1, 1.5, 3, 2]], dtype=torch.float64).repeat(20, 1)
    targets = torch.zeros(40, dtype=torch.long)
    steps = torch.arange(4).split(1)[:-1]
    assert pruned_hits(layer, steps, features, targets).tolist() == [40, 40, 20, 40]
    model, data = nn.Sequential(nn.Identity(), layer), batched(TensorDataset(features, targets))
    held_out = data.split(RANKED_ON, derived_seed(0, "pruning"))[1]
    wrong = float(torch.cat([batch[0][:, 1] for batch in held_out.ordered()]).bool().double().mean())
    assert 0 < wrong < 1
    for budget, count in ((wrong, 1), (wrong + 1e-9, 3)):
        chosen = FinePruningDefense(max_pruning_drop=budget)._chosen(model, "1", data, Run(amp=False))
        assert chosen.tolist() == [index < count for index in range(4)]


def test_hits_are_those_of_networks_with_columns_of_zeros():
    model, data = network(), images()
    model[-1].bias.data.copy_(torch.tensor([0.1, -0.1, 0.3]))
    order = torch.randperm(144, generator=torch.Generator().manual_seed(1))
    steps = order.split(5)[:-1]
    actual = pruned_hits(model[-1], steps, *features_into(model, "4", batched(data), Run(amp=False)))
    columns = [order[: 5 * count].tolist() for count in range(29)]
    assert actual.tolist() == [round(60 * accuracy(model, data, part)) for part in columns]
    assert len(set(actual.tolist())) > 2


def test_activity_is_that_of_loops():
    model, data = network(nn.Identity()), images()
    actual = mean_activations(model.train(), "4", batched(data), Run(amp=False))
    assert model.training
    assert not model[4]._forward_pre_hooks
    model.eval()
    expected = torch.tensor(activity(model, data.tensors[0]), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    # The means themselves would rank them otherwise.
    with torch.no_grad():
        means = model[:-1](data.tensors[0]).mean(0)
    assert float(means.min()) < -0.01


def test_predictions_that_do_not_count_do_not_rank():
    """Tokens [B, T, D] with padding, and a layer that is called by keyword."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(5, 3)

        def forward(self, x):
            return self.last(input=x)

    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(10, 6, 5, generator=generator), torch.randint(3, (10, 6), generator=generator)
    labels[:, 4:] = task.IGNORED
    x[:, 4:] = 1e6
    model, data = Tagger(), TensorDataset(x, labels)
    actual = mean_activations(model, "last", batched(data), Run(amp=False))
    torch.testing.assert_close(actual, x[:, :4].double().abs().mean((0, 1)), rtol=1e-6, atol=0)
    features, targets = features_into(model, "last", batched(data), Run(amp=False))
    assert torch.equal(features, x[:, :4].flatten(0, 1))
    assert torch.equal(targets, labels[:, :4].flatten())
    result = bdfast.purify(model, data, method=FinePruningDefense(lr=0.01, epochs=1), batch_size=5)
    assert set(result.found) == {"pruned_features"}


def test_the_published_run():
    """SGD with a mask on the weights, as `torch.nn.utils.prune` has it."""
    model, data, epochs, lr = network(), images(), 4, 0.05
    columns = expected_columns(model, data, 0.1)
    expected = copy.deepcopy(model).train()
    mask = torch.ones(3, 144, dtype=torch.float64)
    mask[:, columns] = 0
    original = nn.Parameter(expected[-1].weight.detach() * mask)
    params = [x for name, x in expected.named_parameters() if name != "4.weight"]
    optimizer = torch.optim.SGD([*params, original], lr=lr, momentum=0.9, weight_decay=5e-4)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for pixels, labels in list(batches(data, BATCH, epochs))[epoch * 8 : epoch * 8 + 8]:
            logits = F.linear(expected[:-1](pixels), original * mask, expected[-1].bias)
            optimizer.zero_grad()
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
    expected[-1].weight = nn.Parameter(original.detach() * mask)
    result = purified(model, data, epochs=epochs, lr=lr)
    assert_same(result.model, expected, model)
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert result.found["pruned_features"] == len(columns)
    weight = result.model[-1].weight
    assert not weight[:, columns].any()
    assert int(weight.any(0).sum()) == 144 - len(columns)


def test_with_selection(trained, clean):
    """What is cut off stays so through all stages."""
    result = bdfast.purify(trained, clean, method=FinePruningDefense(updates=4, max_accuracy_drop=1.0), amp=False)
    assert result.verdict is not None
    assert result.options["lr"] is not None
    count = result.found["pruned_features"]
    assert 0 < count < 128
    assert int((~result.model[-1].weight.any(0)).sum()) >= count
    assert int((~trained[-1].weight.any(0)).sum()) < count


def test_a_network_that_knows_nothing_keeps_its_features():
    model, data = network(), images()
    data = TensorDataset(data.tensors[0], (model(data.tensors[0]).argmax(1) + 1) % 3)
    assert purified(model, data, epochs=1).found["pruned_features"] == 0


NETWORKS = {
    "pooled": lambda: SmallVGG(3, depth=11, width=2, in_channels=1),
    "vit": lambda: SmallViT(3, image_size=4, width=8, depth=2, in_channels=1, patch_size=2),
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 3)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False)),
    "one feature": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.Linear(1, 3)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds(name):
    with seeded(0, torch.device("cpu")):
        model = NETWORKS[name]().eval()
    result = purified(model, images(30, torch.float32), epochs=2, max_pruning_drop=0.5)
    last = [module for module in result.model.modules() if isinstance(module, nn.Linear)][-1]
    assert int((~last.weight.any(0)).sum()) == result.found["pruned_features"] < last.in_features


def test_what_cannot_be_pruned_is_refused():
    data = images()
    frozen, computed = network(), network()
    frozen[-1].weight.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(computed[-1])
    with pytest.raises(ValueError, match=r"got 4.weight, which is frozen; call"):
        purified(frozen, data, epochs=1)
    with pytest.raises(ValueError, match=r"got 4.weight, which is computed in every pass; make"):
        purified(computed, data, epochs=1)
    with pytest.raises(ValueError, match="model: expected a linear layer whose outputs are the logits"):
        purified(nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()).double(), data, epochs=1)
    with pytest.raises(ValueError, match="max_pruning_drop: expected a share"):
        FinePruningDefense(max_pruning_drop=1.5)
