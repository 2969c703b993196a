"""ULRL: against a plain transcription of the published script; which rows, how they are drawn, and the penalty."""

import copy
import math
from collections import Counter

import pytest
import torch
from published_runs import assert_same, batches
from something_to_unlearn import images, purified, trained
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast.defenses.loss import PreparedBatch
from bdfast.defenses.ulrl import RelearningLoss, ULRLDefense
from bdfast.neurons import NeuronIndex, NeuronScores
from bdfast.training import Run
from bdfast.training.seeds import derived_seed, seeded

BATCH, CLASSES = 8, 7


def network(classes: int = CLASSES) -> nn.Module:
    with seeded(0, torch.device("cpu")):
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)]
        return trained(nn.Sequential(*layers, nn.Linear(128, classes)), images(classes))


def published_rows(
    original: nn.Module, data: TensorDataset, lr: float, epochs: int, seen: Counter
) -> tuple[torch.Tensor, list[int]]:
    """What unlearning changes in each row, and the rows that stand out."""
    model = copy.deepcopy(original).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[10, 20], gamma=0.1)
    steps = list(batches(data, BATCH, epochs, "unlearn"))
    in_epoch = len(steps) // epochs
    for epoch in range(epochs):
        hits = count = 0
        # The generator is set where `batches` says so, which a list has passed by.
        torch.manual_seed(derived_seed(0, "unlearn", epoch + 1))
        for pixels, labels in steps[epoch * in_epoch : (epoch + 1) * in_epoch]:
            logits = model(pixels)
            optimizer.zero_grad()
            (-F.cross_entropy(logits, labels)).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=20, norm_type=2)
            seen["cut"] += int(norm > 20)
            optimizer.step()
            hits, count = hits + int((logits.argmax(1) == labels).sum()), count + len(labels)
        schedule.step()
        seen["epochs"] += 1
        if hits / count <= 0.2:
            seen["reached"] += 1
            break
    change = (model[-1].weight - original[-1].weight).abs().sum(1)
    median = torch.median(change)
    deviation = torch.median(torch.abs(change - median))
    z = torch.abs((change - median) / (1.4826 * deviation))
    return change.detach(), torch.where((z > 3.5) & (change > median))[0].tolist()


@pytest.mark.parametrize(("lr", "epochs", "reached"), [(0.003, 20, True), (2e-4, 22, False)], ids=["reached", "not"])
def test_the_published_run(lr, epochs, reached):
    """Rows, penalty, and statistics that move before and after each update."""
    model, data, seen = network(), images(CLASSES), Counter()
    change, outliers = published_rows(model, data, lr, epochs, seen)
    rows = outliers[:2]
    assert (seen["reached"], seen["cut"] > 0) == (int(reached), True)
    assert seen["epochs"] == 22 or reached
    assert rows

    expected = copy.deepcopy(model).train()
    before = model[-1].weight.detach()[rows].clone()
    bound = math.sqrt(2.0 / 128)
    draws = torch.Generator().manual_seed(derived_seed(0, "rows"))
    with torch.no_grad():
        uniform = torch.rand(len(rows), 128, dtype=torch.float64, generator=draws)
        expected[-1].weight[rows] = -bound + 2 * bound * uniform
        expected[-1].bias[rows] = 0
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for step, (pixels, labels) in enumerate(batches(data, BATCH, 6)):
        cosines = F.cosine_similarity(expected[-1].weight[rows], before, dim=1)
        optimizer.zero_grad()
        (F.cross_entropy(expected(pixels), labels) + 0.7 * torch.sum(cosines)).backward()
        optimizer.step()
        expected(pixels)
        if step % 8 == 7:
            schedule.step()
    result = purified(model, data, ULRLDefense, BATCH, unlearn_lr=lr, unlearn_epochs=epochs, lr=0.05, epochs=6)
    assert_same(result.model, expected, model)
    torch.testing.assert_close(result.scores.values.double(), change, rtol=1e-6, atol=0)
    assert result.found == {"rows": rows}
    assert result.neurons.nonzero().flatten().tolist() == rows
    assert [row.stage for row in result.history[1:]].count("unlearn") == seen["epochs"]


def scores(values: list[float]) -> NeuronScores:
    return NeuronScores(torch.tensor(values), NeuronIndex(nn.Linear(1, len(values))).layers)


@pytest.mark.parametrize(
    ("values", "ours", "published"),
    [
        ([1.0, 1.1, 0.9, 1.0, 8.0, 1.2, 5.0, 0.8, 9.0, 1.1, 0.9], [8, 4], [4, 6]),
        ([1.0, 1.1, 0.9, 1.2, 0.8], [], []),
        ([2.0, 2.0, 2.0, 2.1, 1.0], [3], [3]),  # no deviation
        ([2.0, 2.0, 2.0, 2.0], [], []),
        ([0.0, 0.0, 0.0], [], []),
        ([1.0, 2.0], [], [1]),  # the lower median of two is the lesser
        ([1.0], [], []),
        ([1.0, 1.1, 2.0], [2], [2]),
    ],
)
def test_the_rows_that_stand_out(values, ours, published):
    assert ULRLDefense().outlying(scores(values)) == ours
    assert ULRLDefense(compat="official").outlying(scores(values)) == published
    assert ULRLDefense(most_rows=1).outlying(scores(values)) == ours[:1]
    with pytest.raises(ValueError, match="NaN"):
        ULRLDefense().outlying(scores([*values, math.nan]))


def relearning(rows: torch.Tensor, before: torch.Tensor, **options) -> RelearningLoss:
    return RelearningLoss(Run(amp=False), classifier="", rows=rows, before=before, options=ULRLDefense(**options))


@pytest.mark.parametrize("compat", [None, "official"])
def test_the_penalty(compat):
    """Of a row that is like what it was, of one that is its opposite, and of one that was zero."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 6).double()
    rows = torch.tensor([True, False, True, False, True, True])
    noise = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    before = model.weight.detach()[rows] * torch.tensor([[1.0], [-2.0], [3.0], [0.0]]) + 0.2 * noise
    before[-1] = 0
    batch = (torch.randn(9, 5, dtype=torch.float64, generator=generator), torch.arange(9) % 6)
    loss = relearning(rows, before, alpha=0.3, compat=compat)
    actual = loss(model, PreparedBatch(batch)).loss
    gradient = torch.autograd.grad(actual, model.weight)[0]

    plain = F.cross_entropy(model(batch[0]), batch[1])
    expected = torch.autograd.grad(plain, model.weight, retain_graph=True)[0]
    total, signs = float(plain.detach()), []
    for row, old in zip(rows.nonzero().flatten().tolist(), before.tolist(), strict=True):
        new = model.weight[row].tolist()
        a, b = math.hypot(*new), math.hypot(*old)
        cosine = sum(x * y for x, y in zip(new, old, strict=True)) / (a * b) if b else 0.0
        signs.append((cosine > 0) - (cosine < 0))
        if b and (compat or cosine > 0):
            total += 0.3 * cosine
            for column in range(5):
                expected[row, column] += 0.3 * (old[column] / b - cosine * new[column] / a) / a
    assert signs == [1, -1, 1, 0]
    assert float(actual.detach()) == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_no_row_leaves_fine_tuning():
    model, batch = nn.Linear(5, 3), (torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))
    loss = relearning(torch.zeros(3, dtype=torch.bool), torch.zeros(0, 5))
    actual = loss(model, PreparedBatch(batch)).loss
    assert torch.equal(actual, F.cross_entropy(model(batch[0]), batch[1]))
    actual.backward()
    assert bool(model.weight.grad.isfinite().all())


def begun(model: nn.Module, data: TensorDataset, **options) -> tuple[nn.Module, bdfast.PurifyResult]:
    """The model before a training that does next to nothing."""
    method = ULRLDefense(lr=1e-12, epochs=1, bn="frozen", **options)
    result = bdfast.purify(model, data, method=method, batch_size=BATCH, augment=None, amp=False)
    return result.model, result


@pytest.mark.parametrize("bias", [True, False])
def test_rows_are_drawn_anew(bias, monkeypatch):
    monkeypatch.setattr(ULRLDefense, "outlying", lambda self, scores: [4, 2])
    with seeded(0, torch.device("cpu")):
        model = trained(nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES, bias=bias)), images(CLASSES))
    drawn, result = begun(model, images(CLASSES))
    assert result.found["rows"] == [4, 2]
    assert result.scores.layers[0].parameter == "1.weight"
    assert result.neurons.tolist() == [False, False, True, False, True, False, False]
    new, old = drawn[1].weight, model[1].weight
    bound = math.sqrt(2 / 16)
    for row in range(CLASSES):
        if row not in (2, 4):
            torch.testing.assert_close(new[row], old[row], rtol=0, atol=1e-9)
    fresh = new[[2, 4]]
    assert 0.8 * bound < float(fresh.detach().abs().max()) < bound
    assert float(fresh.detach().min()) < -0.5 * bound
    if bias:
        assert float(drawn[1].bias.detach()[[2, 4]].abs().max()) < 1e-9
    other = bdfast.purify(model, images(CLASSES), method=ULRLDefense(lr=1e-12, epochs=1), seed=1, augment=None).model
    assert float((other[1].weight - new)[[2, 4]].detach().abs().max()) > 0.1


class Attention(nn.Module):
    """A head of another name in front of other linear layers, LayerNorm, and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)
        self.embed = nn.Linear(4, 12)
        self.block = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embed(x.flatten(1, -2))).mean(1))


def plain_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))


def one_dimensional() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))


@pytest.mark.parametrize(
    ("build", "shape", "layer"),
    [
        (Attention, (1, 4, 4), "head.weight"),
        (plain_cnn, (1, 4, 4), "3.weight"),
        (one_dimensional, (4, 4), "4.weight"),
        (lambda: nn.Linear(6, 5), (6,), "weight"),
    ],
)
def test_networks_of_other_kinds(build, shape, layer):
    data = images(5, shape)
    with seeded(0, torch.device("cpu")):
        model = trained(build(), data)
    frozen = [x for name, x in model.named_parameters() if name != layer][:1]
    for parameter in frozen:
        parameter.requires_grad_(False)
    start = copy.deepcopy(model.state_dict())
    result = bdfast.purify(model, data, method=ULRLDefense(lr=0.01, updates=4), batch_size=BATCH)
    assert [x.parameter for x in result.scores.layers] == [layer]
    assert all(torch.equal(x, start[name]) for name, x in model.state_dict().items())
    moved = [name for name, x in result.model.named_parameters() if not torch.equal(x, start[name])]
    assert layer in moved
    assert len(frozen) == 1
    assert not any(x is frozen[0] for name, x in model.named_parameters() if name in moved)


def test_two_classes_have_no_row_that_stands_out():
    result = bdfast.purify(network(2), images(2), method=ULRLDefense(lr=0.01, updates=4), batch_size=BATCH)
    assert result.found == {"rows": []}
    assert not result.neurons.any()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.out = nn.Linear(6, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.embedding(tokens).mean(1))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda model: model[-1].weight.requires_grad_(False), "5.weight, which is frozen"),
        (lambda model: nn.utils.parametrizations.weight_norm(model[-1]), "5.weight, which is computed"),
        (lambda model: model.append(nn.Softmax(1)), "whose outputs are the logits, got none"),
    ],
)
def test_classifiers_that_are_refused(change, match):
    model = network()
    change(model)
    with pytest.raises(ValueError, match=match):
        bdfast.purify(model, images(CLASSES), method=ULRLDefense(lr=0.01))


def test_a_tied_classifier_is_refused():
    tokens = TensorDataset(torch.randint(5, (40, 3)), torch.arange(40) % 5)
    with pytest.raises(ValueError, match=r"out\.weight, which is embedding\.weight as well"):
        bdfast.purify(Tied(), tokens, method=ULRLDefense(lr=0.01))


@pytest.mark.parametrize(
    ("name", "value"),
    [("most_rows", 0), ("alpha", -1.0), ("unlearn_lr", 0.0), ("unlearn_to", 0.95), ("unlearn_epochs", 0)],
)
def test_options_that_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        ULRLDefense(**{name: value})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_with_selection(trained, clean):
    result = bdfast.purify(trained, clean, method=ULRLDefense(updates=3))
    assert "lr" in result.options
    assert len(result.found["rows"]) <= 2
    assert result.verdict is not None
    assert [x.parameter for x in result.scores.layers] == ["4.weight"]
