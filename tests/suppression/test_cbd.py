"""CBD: its weights, its penalties, and both stages against a plain transcription."""

import copy
import math

import pytest
import torch
from published_runs import assert_same, batches
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bdfast.suppression import CBDSuppression
from bdfast.suppression.cbd import causal_weights
from bdfast.suppression.dependence import hsic
from bdfast.suppression.suppressing import suppress

BATCH = 32
PLAIN = {"augment": None, "amp": False, "method": "cbd", "batch_size": BATCH}
FIRST, SECOND = 2, 10
SHORT = {"backdoor_epochs": FIRST, "epochs": SECOND, "gamma": None}


def test_the_weights():
    first, second = [0.01, 2.0, 0.5, 0.0], [3.0, 0.1, 0.5, 1.0]
    plain = [b / (b + c + 1e-8) for b, c in zip(first, second, strict=True)]
    mean = sum(plain) / 4
    found = causal_weights(torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64))
    assert found.tolist() == pytest.approx([x / mean for x in plain], abs=1e-12)
    assert float(found.mean()) == pytest.approx(1, abs=1e-12)


def test_equal_losses_weigh_one_and_learned_ones_nothing():
    losses = torch.rand(6, generator=torch.Generator().manual_seed(0)) + 0.1
    torch.testing.assert_close(causal_weights(losses, losses), torch.ones(6))
    assert causal_weights(torch.zeros(3), torch.ones(3)).tolist() == [0, 0, 0]
    assert causal_weights(torch.zeros(3), torch.zeros(3)).isfinite().all()


def test_no_gradient_flows_through_the_weights():
    losses = torch.rand(6, requires_grad=True)
    assert not causal_weights(losses, losses).requires_grad


def plain_hsic(x: list[list[float]], y: list[list[float]]) -> float:
    count = len(x)

    def kernel(rows: list[list[float]]) -> list[list[float]]:
        squared = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
        others = sorted(squared[i][j] for i in range(count) for j in range(count) if i != j)
        width = others[(len(others) - 1) // 2]
        return [[math.exp(-d / width) for d in row] for row in squared]

    k, l = kernel(x), kernel(y)  # noqa: E741
    h = [[(i == j) - 1 / count for j in range(count)] for i in range(count)]

    def product(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
        return [[sum(a[i][t] * b[t][j] for t in range(count)) for j in range(count)] for i in range(count)]

    khlh = product(product(product(k, h), l), h)
    return sum(khlh[i][i] for i in range(count)) / (count - 1) ** 2


def test_hsic():
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, generator=draws, dtype=torch.float64) + 100
    y = torch.randn(9, 5, generator=draws, dtype=torch.float64)
    assert float(hsic(x, y)) == pytest.approx(plain_hsic(x.tolist(), y.tolist()), abs=1e-10)
    assert float(hsic(x, x)) > 2 * float(hsic(x, y)) > 0
    assert float(hsic(x, torch.zeros(9, 2, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)
    assert float(hsic(x[:1], y[:1])) == 0
    y.requires_grad_(True)
    hsic(x, y).backward()
    assert y.grad.isfinite().all()
    assert float(y.grad.abs().max()) > 0
    same = torch.zeros(4, 2, requires_grad=True)
    hsic(same, x[:4].float()).backward()
    assert same.grad.isfinite().all()


def transcribed(model: nn.Module, data: TensorDataset, schedule: bool) -> tuple[nn.Module, nn.Module]:
    """The released training, with the schedule on the optimizer of the second network."""
    networks = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    first, second = (
        torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4) for net in networks
    )
    backdoored, clean = networks
    for x, y in batches(data, BATCH, FIRST, "backdoored"):
        first.zero_grad()
        F.cross_entropy(backdoored(x), y).backward()
        first.step()
    backdoored.eval()
    steps = -(-len(data) // BATCH)
    for number, (x, y) in enumerate(batches(data, BATCH, SECOND, "clean")):
        epoch = number // steps
        second.param_groups[0]["lr"] = 0.1 if epoch < 2 or not schedule else 0.01 if epoch < 7 else 0.001
        with torch.no_grad():
            loss_b = F.cross_entropy(backdoored(x), y, reduction="none")
        loss_c = F.cross_entropy(clean(x), y, reduction="none")
        w = (loss_b / (loss_b + loss_c + 1e-8)).detach()
        w = w / w.mean()
        second.zero_grad()
        (w * loss_c).mean().backward()
        second.step()
    return backdoored, clean.eval()


@pytest.mark.parametrize("schedule", [True, False])
def test_the_published_run(network, suspicious, schedule):
    backdoored, clean = transcribed(network, suspicious, schedule)
    changes = {} if schedule else {"schedule": "constant"}
    result = suppress(network, suspicious, **{**CBDSuppression.PUBLISHED, **PLAIN, **SHORT, **changes}, ratio=0.05)
    assert_same(result.model, clean, network)
    images, labels = suspicious.tensors
    with torch.no_grad():
        loss_b, loss_c = (F.cross_entropy(net(images), labels, reduction="none") for net in (backdoored, clean))
    shares = (loss_b / (loss_b + loss_c + 1e-8)).tolist()
    least = sorted(range(200), key=lambda index: (shares[index], index))[:10]
    assert result.suspected.tolist() == sorted(least)
    assert result.updates == 7 * (FIRST + SECOND)


@pytest.mark.parametrize(("penalty", "weight"), [("dependence", 30.0), ("information", 0.01)])
def test_a_penalty_lowers_what_it_penalises(network, suspicious, penalty, weight):
    """Both at the features before the classifier: what it is given."""
    images = suspicious.tensors[0]
    plain, bent = (
        suppress(network, suspicious, **PLAIN, **SHORT, **options).model for options in ({}, {penalty: weight})
    )
    first = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for x, y in batches(suspicious, BATCH, FIRST, "backdoored"):
        optimizer.zero_grad()
        F.cross_entropy(first(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        r, z, bent_z = (net.eval()[:-1](images) for net in (first, plain, bent))
    if penalty == "dependence":
        assert float(hsic(bent_z, r)) < 0.9 * float(hsic(z, r))
    else:
        assert float(bent_z.square().sum(1).mean()) < 0.5 * float(z.square().sum(1).mean())
    assert not bent._modules["4"]._forward_pre_hooks


def test_the_first_step_of_the_penalties(network, suspicious):
    """One update of the second network, by plain autograd."""
    settings = {
        "backdoor_epochs": 1,
        "gamma": 5.0,
        "epochs": 1,
        "dependence": 0.7,
        "information": 0.01,
        "batch_size": 200,
    }
    result = suppress(network, suspicious, **{**PLAIN, **settings})
    images, labels = suspicious.tensors
    first, second = copy.deepcopy(network), copy.deepcopy(network)
    for net in (first, second):
        net.train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        losses = F.cross_entropy(net(images), labels, reduction="none")
        loss = (losses.mean() - 5.0).sign() * losses.mean()
        if net is second:
            first.eval()
            with torch.no_grad():
                loss_b, r = F.cross_entropy(first(images), labels, reduction="none"), first[:-1](images)
            w = (loss_b / (loss_b + losses + 1e-8)).detach()
            z = F.relu(F.batch_norm(net[0](images), None, None, net[1].weight, net[1].bias, training=True)).flatten(1)
            loss = (w / w.mean() * losses).mean() + 0.7 * hsic(z, r) + 0.01 * z.square().sum(1).mean()
        loss.backward()
        optimizer.step()
    for found, expected in zip(result.model.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_few_samples_get_more_epochs(network, suspicious):
    result = suppress(network, suspicious, **{**PLAIN, "batch_size": 200, "backdoor_epochs": 1, "epochs": 2})
    assert {name: result.options[name] for name in ("backdoor_epochs", "epochs")} == {"backdoor_epochs": 1, "epochs": 2}
    more = suppress(network, suspicious, **{**PLAIN, "epochs": 1})
    assert more.options["backdoor_epochs"] == 29
    assert len(more.suspected) == 2


def test_a_penalty_needs_a_classifier(suspicious):
    model = nn.Sequential(nn.Conv2d(2, 5, 8), nn.Flatten()).double()
    suppress(model, suspicious, **PLAIN, **SHORT)
    with pytest.raises(ValueError, match="model: expected a linear layer whose outputs are the logits"):
        suppress(model, suspicious, **PLAIN, **SHORT, dependence=1.0)


@pytest.mark.parametrize("option", ["dependence", "information"])
def test_penalties_are_not_negative(option):
    with pytest.raises(ValueError, match=f"{option}: expected at least 0, got -1"):
        CBDSuppression(**{option: -1.0})
    with pytest.raises(ValueError, match="backdoor_epochs: expected at least 1, got 0"):
        CBDSuppression(backdoor_epochs=0)
    with pytest.raises(ValueError, match="gamma: expected a positive number"):
        CBDSuppression(gamma=0.0)
    with pytest.raises(ValueError, match="ratio: expected a share"):
        CBDSuppression(ratio=1.0)
