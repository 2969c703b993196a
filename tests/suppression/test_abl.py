"""ABL: against a plain transcription of the published stages; its losses; its rules."""

import copy
import math

import pytest
import torch
from published_runs import assert_same, batches
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast.data.batches import Batches
from bdfast.suppression import ABLSuppression
from bdfast.suppression.isolation import Isolation
from bdfast.suppression.local_ascent import held_at
from bdfast.suppression.sample_losses import SampleScores
from bdfast.suppression.suppressing import suppress
from bdfast.suppression.unlikelihood import signed_losses, unlikelihood
from bdfast.task import IGNORED
from bdfast.training import Epoch, Run

# A few updates on a few samples, where only the mechanics count.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unlearn_lr. expected:UserWarning"),
    pytest.mark.filterwarnings("ignore:model. expected to learn:UserWarning"),
]

BATCH, ISOLATED, UNLEARNED = 32, 10, 3
PLAIN = {"augment": None, "amp": False}
SHORT = {"isolation_epochs": 3, "epochs": 6, "unlearn_epochs": UNLEARNED, "recover_epochs": 0, "ratio": 0.05}


def plain_loss(losses: list[float], gamma: float, lga: str) -> float:
    mean = sum(losses) / len(losses)
    if lga == "sample":
        return sum(math.copysign(1, x - gamma) * x for x in losses) / len(losses)
    return abs(mean - gamma) + gamma if lga == "flooding" else math.copysign(1, mean - gamma) * mean


@pytest.mark.parametrize("lga", ["batch", "sample", "flooding"])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_held_loss(lga, scale):
    draws = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(8, 5, generator=draws, dtype=torch.float64)
    targets = logits.argmax(1).index_fill(0, torch.tensor([1, 4]), 0)
    losses = [
        math.log(sum(math.exp(x) for x in row)) - row[y]
        for row, y in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    gamma = 0.7 if scale == 3.0 else 0.5
    assert min(losses) < gamma < max(losses) or scale == 0.3
    assert float(held_at(logits, targets, gamma, lga)) == pytest.approx(plain_loss(losses, gamma, lga), abs=1e-12)


def test_the_two_forms_agree_where_all_losses_lie_on_one_side_and_differ_otherwise():
    draws = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(8, 5, generator=draws, dtype=torch.float64)
    targets = logits.argmax(1).index_fill(0, torch.tensor([1, 4]), 0)
    for gamma in (1e-9, 50.0):
        batch, sample = (float(held_at(logits, targets, gamma, lga)) for lga in ("batch", "sample"))
        assert batch == pytest.approx(sample, abs=1e-12)
    batch, sample = (float(held_at(logits, targets, 0.5, lga)) for lga in ("batch", "sample"))
    assert abs(batch - sample) > 0.01


def transcribed(model: nn.Module, data: TensorDataset, lga: str, gamma: float) -> tuple[nn.Module, set[int]]:
    """The three stages with plain torch; isolation one sample at a time."""

    def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def sgd(lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)

    model = copy.deepcopy(model).train()
    images, labels = data.tensors
    optimizer = sgd(0.1)
    for x, y in batches(data, BATCH, SHORT["isolation_epochs"], "isolate"):
        losses = F.cross_entropy(model(x), y, reduction="none")
        if lga == "sample":
            step(optimizer, (torch.sign(losses - gamma) * losses).mean())
        elif lga == "batch":
            step(optimizer, torch.sign(losses.mean() - gamma) * losses.mean())
        else:
            step(optimizer, (losses.mean() - gamma).abs() + gamma)
    model.eval()
    alone = []
    for index in range(len(data)):
        with torch.no_grad():
            alone.append((float(F.cross_entropy(model(images[index : index + 1]), labels[index : index + 1])), index))
    isolated = sorted(index for _, index in sorted(alone)[:ISOLATED])
    rest = [index for index in range(len(data)) if index not in isolated]
    model.train()
    optimizer = sgd(0.1)
    steps = -(-len(rest) // BATCH)
    for number, (x, y) in enumerate(batches(TensorDataset(*data[rest]), BATCH, SHORT["epochs"], "fine-tune")):
        optimizer.param_groups[0]["lr"] = 0.1 if number // steps < 4 else 0.01
        step(optimizer, F.cross_entropy(model(x), y))
    optimizer = sgd(0.03)
    for x, y in batches(TensorDataset(*data[isolated]), BATCH, UNLEARNED, "unlearn"):
        step(optimizer, -F.cross_entropy(model(x), y))
    return model, set(isolated)


@pytest.mark.parametrize(("lga", "gamma"), [("batch", 1.2), ("sample", 1.2), ("flooding", 1.2)])
def test_the_published_run(network, suspicious, lga, gamma):
    expected, isolated = transcribed(network, suspicious, lga, gamma)
    options = {**ABLSuppression.PUBLISHED, **SHORT, "batch_size": BATCH, "lga": lga, "gamma": gamma}
    result = suppress(network, suspicious, method="abl", **PLAIN, **{**options, "unlearn_lr": 0.03})
    assert_same(result.model, expected, network)
    assert set(result.suspected.tolist()) == isolated
    assert result.suspected.tolist() == sorted(isolated)
    # The level was reached, so that the sign has turned.
    held = [row for row in result.history if isinstance(row, Epoch) and row.stage == "isolate"]
    assert min(row.loss for row in held) < gamma + 0.3
    assert result.updates == 7 * 3 + 6 * 6 + UNLEARNED


def test_flooding_moves_the_weights_as_the_batch_does(network, suspicious):
    one, two = (
        suppress(network, suspicious, lga=lga, gamma=1.2, batch_size=BATCH, **PLAIN, **SHORT)
        for lga in ("batch", "flooding")
    )
    assert torch.equal(one.model[0].weight, two.model[0].weight)
    assert not torch.equal(one.model[0].weight, network[0].weight)


def epochs_of(result: bdfast.SuppressResult, stage: str) -> list[Epoch]:
    return [row for row in result.history if isinstance(row, Epoch) and row.stage == stage]


def test_unlearning_ends_when_it_has_cost_enough(network, suspicious):
    options = {**SHORT, "unlearn_epochs": 30, "unlearn_lr": 0.003, "batch_size": BATCH, **PLAIN}
    result = suppress(network, suspicious, **options)
    count = len(epochs_of(result, "unlearn"))
    assert 1 < count < 30
    freely = suppress(network, suspicious, **{**options, "unlearn_drop": None})
    assert len(epochs_of(freely, "unlearn")) == 30
    sooner = suppress(network, suspicious, **{**options, "unlearn_drop": 0.0})
    assert len(epochs_of(sooner, "unlearn")) < count


@pytest.mark.parametrize("bn", ["frozen", "official"])
def test_the_statistics_in_the_ascent(network, suspicious, bn):
    result = suppress(network, suspicious, bn=bn, unlearn_drop=None, batch_size=BATCH, **PLAIN, **SHORT)
    counted = int(result.model[1].num_batches_tracked)
    assert counted == 7 * 3 + 6 * 6 + (UNLEARNED if bn == "official" else 0)


def test_few_samples_get_more_epochs(suspicious):
    few = Batches(suspicious, device="cpu", batch_size=BATCH)  # 7 updates an epoch
    names = ("isolation_epochs", "epochs", "unlearn_epochs", "recover_epochs")
    assert ABLSuppression().settled(few) == dict(zip(names, (58, 172, 40, 15), strict=True))
    given = dict(zip(names, (3, 2, 0, 0), strict=True))
    assert ABLSuppression(**given).settled(few) == given
    many = Batches(TensorDataset(torch.zeros(50_000, 1), torch.zeros(50_000)), device="cpu", batch_size=128)
    assert ABLSuppression().settled(many) == dict(zip(names, (20, 60, 10, 2), strict=True))


def test_isolated_samples_without_a_common_label_are_told():
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    for labels, count in (([2, 2, 2, 1, 0, 2], 0), ([2, 1, 1, 2, 0, 2], 1)):
        losses = SampleScores(torch.arange(6), scores, torch.tensor(labels))
        isolation = Isolation(losses, losses.lowest(4))
        assert len(isolation.warnings()) == count
        assert isolation.rest.tolist() == [4, 5]
    assert isolation.labels == {"1": 2, "2": 2}
    assert "got 2 of 4 with the most frequent, 1" in isolation.warnings()[0]
    assert isolation.bystanders.tolist() == [4, 5]
    assert Isolation(losses, torch.tensor([0])).bystanders.tolist() == [1, 2, 4]


def test_so_many_bystanders_are_enough():
    losses = SampleScores(torch.arange(5000), torch.arange(5000.0), torch.arange(5000) % 2)
    bystanders = Isolation(losses, losses.lowest(20)).bystanders
    assert 500 <= len(bystanders) <= 1000
    assert int(bystanders[-1]) > 4900
    assert set((bystanders % 2).tolist()) == {1}


def test_the_warning_comes_with_the_result(network, suspicious):
    with pytest.warns(UserWarning, match="unlearn_lr") as told:
        result = suppress(network, suspicious, batch_size=BATCH, **PLAIN, **{**SHORT, "unlearn_lr": 1e-9})
    assert [str(warning.message) for warning in told] == result.warnings
    assert told[0].filename == __file__
    assert result.found["isolated_labels"]["3"] == 10


def test_an_ascent_that_costs_accuracy_is_told(network, suspicious):
    changes = {"unlearn_lr": 0.03, "unlearn_epochs": 20, "unlearn_drop": None}
    with pytest.warns(UserWarning, match="unlearn_lr: expected an unlearning that keeps"):
        suppress(network, suspicious, batch_size=BATCH, **PLAIN, **{**SHORT, **changes})


def test_samples_that_keep_their_label_are_told(network, suspicious):
    with pytest.warns(UserWarning, match=r"unlearn_lr: expected isolated samples that are unlearned, got \d"):
        result = suppress(network, suspicious, batch_size=BATCH, **PLAIN, **{**SHORT, "unlearn_lr": 1e-9})
    assert result.found["isolated_accuracy"] > 0.5


def test_our_unlearning(network, suspicious):
    """Both steps by plain torch, from the weights after the training on the rest."""
    options = {**SHORT, "batch_size": BATCH, "unlearn_lr": 0.02, "unlearn_drop": None}
    with pytest.warns(UserWarning, match="unlearn_lr"):
        start = suppress(network, suspicious, **PLAIN, **{**options, "unlearn_epochs": 0})
    found = suppress(network, suspicious, **PLAIN, **{**options, "recover_epochs": 2})
    isolated, model = start.suspected, copy.deepcopy(start.model).train()
    images, labels = suspicious.tensors

    def update(optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, bad: torch.Tensor) -> None:
        p = model(x).softmax(1)[torch.arange(len(x)), y]
        optimizer.zero_grad()
        torch.where(bad, -(1 - p).log(), -p.log()).mean().backward()
        optimizer.step()

    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, **settings)
    model[1].eval()
    for x, y in batches(TensorDataset(images[isolated], labels[isolated]), BATCH, UNLEARNED, "unlearn"):
        update(optimizer, x, y, torch.ones(len(x), dtype=torch.bool))
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, **settings)
    model.train()
    rejected = 0
    for number, (x, y) in enumerate(batches(suspicious, BATCH, 2, "recover")):
        optimizer.param_groups[0]["lr"] = 0.01 if number < 7 else 0.005
        bad = (reference(x).argmax(1) != y) & torch.isin(y, labels[isolated])
        rejected += int(bad.sum())
        update(optimizer, x, y, bad)
    assert rejected > 10
    assert_same(found.model, model, network)


def test_unlikelihood():
    logits = torch.tensor(
        [[5.0, 1.0, -2.0], [60.0, 0.0, 1.0], [0.0, 0.0, 9.0]], dtype=torch.float64, requires_grad=True
    )
    targets = torch.tensor([0, 0, 1])
    losses = unlikelihood(logits, targets)
    p = [math.exp(row[y]) / sum(map(math.exp, row)) for row, y in zip(logits.tolist(), targets.tolist(), strict=True)]
    assert losses[[0, 2]].tolist() == pytest.approx([-math.log(1 - p[0]), -math.log(1 - p[2])], abs=1e-9)
    assert losses[1].item() == pytest.approx(60 - math.log(1 + math.e), abs=1e-9)  # where 1 - p is zero
    losses.sum().backward()
    assert logits.grad[torch.arange(3), targets].tolist() == pytest.approx(p, abs=1e-9)
    signed = signed_losses(logits, targets, torch.tensor([True, False, False]))
    plain = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(signed, torch.cat([losses[:1], plain[1:]]), rtol=0, atol=1e-12)
    kept = unlikelihood(logits, torch.tensor([0, IGNORED, 1]))
    assert torch.equal(kept, losses[[0, 2]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.6}, r"ratio: expected a share in \[0, 0.5\], got 0.6"),
        ({"lga": "both"}, "lga: expected one of 'batch', 'sample', 'flooding', got 'both'"),
        ({"bn": "at_theta"}, "bn: expected one of 'frozen', 'official', got 'at_theta'"),
        ({"gamma": 0.0}, "gamma: expected a positive number, got 0.0"),
        ({"unlearn_lr": -1.0}, "unlearn_lr: expected a positive number"),
        ({"unlearn": "both"}, "unlearn: expected one of 'unlikelihood', 'ascent', got 'both'"),
        ({"unlearn_drop": 2.0}, r"unlearn_drop: expected a share in \[0, 1\]"),
        ({"recover_epochs": -1}, "recover_epochs: expected at least 0"),
        ({"recover_lr": 0.0}, "recover_lr: expected a positive number"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"unlearn_epochs": -1}, "unlearn_epochs: expected at least 0"),
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"momentum": 1.5}, r"momentum: expected a share in \[0, 1\]"),
        ({"weight_decay": -1.0}, "weight_decay: expected at least 0"),
        ({"schedule": "linear"}, "schedule: expected one of 'cosine', 'step', 'constant', got 'linear'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ABLSuppression(**options)


def test_a_share_that_isolates_one_sample_is_refused_before_the_work(network, suspicious):
    with pytest.raises(ValueError, match=r"ratio: expected a share that isolates at least 2 samples, got 0\.005"):
        suppress(network, suspicious, ratio=0.005, **PLAIN)
    data = Batches(suspicious, device="cpu")
    ABLSuppression(ratio=0.01).check(network, data, Run())


def test_tokens(suspicious):
    """Labels of several tokens a sample; there is no one label then to speak of."""
    draws = torch.Generator().manual_seed(0)
    words = torch.randint(7, (60, 4), generator=draws)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7))
    options = {**SHORT, "epochs": 1, "isolation_epochs": 1}
    result = suppress(model, TensorDataset(words, words), batch_size=20, **PLAIN, **options)
    assert len(result.suspected) == 3
    assert result.found["isolated_labels"] == {}
