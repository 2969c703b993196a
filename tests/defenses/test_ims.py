"""IMS against plain transcriptions in float64 of its search for changes, its losses and its phases."""

import copy
import math

import pytest
import torch
from published_runs import batches
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast import task
from bdfast.data.batches import Batches
from bdfast.defenses.ims import IMSDefense
from bdfast.defenses.parts.inverse_masks import InvertibleMasks, agreeing, disagreeing
from bdfast.neurons.channels import channel_index
from bdfast.training import Run
from bdfast.training.seeds import seeded

CPU = torch.device("cpu")


def images() -> TensorDataset:
    """In [-1, 3]."""
    generator = torch.Generator().manual_seed(0)
    pixels = 4 * torch.rand(40, 1, 4, 4, dtype=torch.float64, generator=generator) - 1
    pixels[0, 0, 0, :2] = torch.tensor([-1, 3])
    return TensorDataset(pixels, torch.randint(3, (40,), generator=generator))


def network() -> nn.Module:
    """Two convolutions with BatchNorm, one with a bias; with dropout the mode of the network shows."""
    with seeded(0, CPU):
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(64, 3),
        ).double()
        pixels, labels = images().tensors
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(40):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
    return model.eval()


def run() -> Run:
    return Run(amp=False, forward=task.normalized(task.default_forward))


def passed(model: nn.Module, pixels, factors: list, *, behind_norm: bool) -> torch.Tensor:
    """Probabilities in eval mode, with factors behind the convolutions or behind the BatchNorms."""
    x = pixels
    for place, factor in zip((0, 3), factors, strict=True):
        x = model[place](x)
        if not behind_norm:
            x = x * factor.view(1, -1, 1, 1)
        norm = model[place + 1]
        deviation = torch.sqrt(norm.running_var + norm.eps)
        x = (x - norm.running_mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)
        x = x * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
        if behind_norm:
            x = x * factor.view(1, -1, 1, 1)
        x = x.clamp(min=0)
    powers = model[8](x.flatten(1)).exp()
    return powers / powers.sum(1, keepdim=True)


def factors_of(masks: list, selections: list, *, inverse: bool = False) -> list:
    result = []
    for m, s in zip(masks, selections, strict=True):
        gate = 1 / (1 + torch.exp(-20 * ((1 - m if inverse else m) - 0.5)))
        result.append(gate + s * (1 - gate))
    return result


def published(first: torch.Tensor, second: torch.Tensor, *, agree: bool) -> torch.Tensor:
    overlap = (first * second).sum(1)
    return -torch.log(overlap + 1e-8).mean() if agree else -torch.log(1.0 - overlap + 1e-8).mean()


def searched(model, pixels, masks, selections, ims: IMSDefense, span: float, *, behind_norm: bool):
    """Changed images, by AdamW as it is defined."""
    whole = [torch.ones_like(m) for m in masks]
    inverse = [x.detach() for x in factors_of(masks, selections, inverse=True)]
    change = torch.zeros_like(pixels)
    first, second, bounded = torch.zeros_like(pixels), torch.zeros_like(pixels), 0
    for step in range(1, ims.steps + 1):
        change.requires_grad_()
        moved = pixels + span * change
        led = passed(model, moved, whole, behind_norm=behind_norm)
        loss = published(passed(model, moved, inverse, behind_norm=behind_norm), led, agree=True)
        loss = loss + published(led, passed(model, pixels, whole, behind_norm=behind_norm), agree=False)
        gradient = torch.autograd.grad(loss, change)[0]
        change = change.detach() * (1 - ims.step_size * 0.01)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        deviation = torch.sqrt(second / (1 - 0.999**step)) + 1e-8
        change = change - ims.step_size * (first / (1 - 0.9**step)) / deviation
        bounded += int((change.abs() > 1).sum())
        change = change.clamp(-1, 1)
    return pixels + span * change, bounded


def invertible(model: nn.Module, seed: int) -> InvertibleMasks:
    """With masks and selection somewhere between 0 and 1."""
    masked = InvertibleMasks(copy.deepcopy(model), channel_index(model, None)).train()
    generator = torch.Generator().manual_seed(seed)
    masked.masks.data.copy_(0.3 + 0.4 * torch.rand(len(masked.masks), generator=generator))
    masked.selection.data.copy_(torch.rand(len(masked.masks), generator=generator))
    return masked


@pytest.mark.parametrize("options", [{"steps": 5, "step_size": 0.01}, {"steps": 4, "step_size": 0.4}])
def test_the_search_for_changes(options):
    """AdamW with its weight decay; the longer steps reach the bound."""
    model, (pixels, labels) = network(), (x[:12] for x in images().tensors)
    ims, masked = IMSDefense(**options), invertible(model, 1)
    batch = ims.changed(masked, (pixels, labels), run(), 4.0)
    masks, selections = (list(x.detach().split([6, 4])) for x in (masked.masks, masked.selection))
    expected, bounded = searched(model, pixels, masks, selections, ims, 4.0, behind_norm=True)
    assert float((batch[0] - expected).abs().max()) < 1e-9
    assert torch.equal(batch[1], labels)
    assert float((batch[0] - pixels).abs().max()) > 0.01
    assert (bounded > 0) == (options["step_size"] == 0.4)
    assert masked.masks.grad is masked.selection.grad is None


def test_masks_and_selection_are_those_of_the_published_phases():
    """With as many rounds as epochs, and batches that hold all images."""
    model, data, first_rounds, rounds = network(), images(), 3, 2
    options = {
        "first_rounds": first_rounds,
        "rounds": rounds,
        "lr": 0.2,
        "steps": 3,
        "step_size": 0.05,
        "sparsity": 0.5,
    }
    ims = IMSDefense(**options)
    masks, selections = ([torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (6, 4)] for _ in range(2))
    whole = [torch.ones(n, dtype=torch.float64) for n in (6, 4)]
    phases = (("masks", first_rounds, 0.5), ("masks, with changes", rounds, 0.0), ("masks, sparse", rounds, 0.5))
    clamped = 0
    for stage, length, sparsity in phases:
        optimizer = torch.optim.AdamW([*selections, *masks], lr=0.2)
        for pixels, _ in batches(data, 128, length, stage):
            moved = None
            if stage != "masks":
                moved, _ = searched(model, pixels, masks, selections, ims, 4.0, behind_norm=False)
            kept, dropped = factors_of(masks, selections), factors_of(masks, selections, inverse=True)
            clean = passed(model, pixels, whole, behind_norm=False)
            loss = published(passed(model, pixels, kept, behind_norm=False), clean, agree=True)
            loss = loss + published(passed(model, pixels, dropped, behind_norm=False), clean, agree=False)
            if moved is not None:
                led = passed(model, moved, whole, behind_norm=False)
                obeying = passed(model, moved, dropped, behind_norm=False)
                loss = loss + published(passed(model, moved, kept, behind_norm=False), clean, agree=True)
                loss = loss + published(obeying, led, agree=True) + published(obeying, clean, agree=False)
            unselected = sum(torch.norm(1 - s, 1) for s in selections) / 10
            optimizer.zero_grad()
            (loss + sparsity * unselected).backward()
            optimizer.step()
            with torch.no_grad():
                for x in (*masks, *selections):
                    clamped += int(((x < 0) | (x > 1)).sum())
                    x.clamp_(0, 1)
    with seeded(0, CPU):
        masked = ims.trained(model, Batches(data, device="cpu"), run())
    for actual, expected in ((masked.masks, masks), (masked.selection, selections)):
        assert float((actual - torch.cat(expected)).detach().abs().max()) < 1e-9
        assert float((1 - torch.cat(expected)).detach().max()) > 0.3
    assert clamped > 0
    assert [layer.parameter for layer in masked.index.layers] == ["0.weight", "3.weight"]


def test_losses_stay_finite_where_both_are_certain():
    """In float32, with 1e-8 beside a product that rounds to 1 or 0."""
    generator = torch.Generator().manual_seed(0)
    logits = 40 * torch.randn(2000, 7, generator=generator)
    answers = logits.requires_grad_().softmax(-1)
    for loss, other in ((agreeing, answers.detach()), (disagreeing, answers.detach().flip(-1))):
        value = loss(answers, other)
        assert 3 < float(value.detach()) < 19
        assert bool(torch.autograd.grad(value, logits, retain_graph=True)[0].isfinite().all())
    p, q = (torch.rand(9, 5, generator=generator).double().softmax(-1) for _ in range(2))
    torch.testing.assert_close(agreeing(p, q), published(p, q, agree=False), rtol=1e-12, atol=0)
    torch.testing.assert_close(disagreeing(p, q), published(p, q, agree=True), rtol=1e-12, atol=0)


def test_a_channel_that_is_not_selected_is_whole_in_both():
    masked = invertible(network(), 1)
    masked.selection.data.fill_(1)
    assert bool((torch.stack([masked.factors(), masked.factors(inverse=True)]) == 1).all())
    masked.selection.data.zero_()
    together = masked.factors() + masked.factors(inverse=True)
    torch.testing.assert_close(together, torch.ones_like(together), rtol=0, atol=1e-12)


def with_factors(model: nn.Module, index: bdfast.NeuronIndex, factors: list[float], monkeypatch) -> None:
    """Training gives these factors."""

    def trained(self, *_):
        masked = InvertibleMasks(copy.deepcopy(model), index)
        masked.masks.data.zero_()
        low = 1 / (1 + math.exp(10))
        masked.selection.data.copy_((torch.tensor(factors) - low) / (1 - low))
        return masked

    monkeypatch.setattr(IMSDefense, "trained", trained)


@pytest.mark.parametrize("scaled", [0, 1])
def test_factors_up_to_the_threshold_scale_their_channels(scaled, trained, clean, monkeypatch):
    """Rows and biases of the convolution, or scales and biases of what normalises."""
    factors = [1.0, 0.5, 0.1, 0.9, 0.2, 1.0, 0.3, 0.7]
    with_factors(trained, bdfast.NeuronIndex(trained, kinds=["conv", "norm"][scaled]), factors, monkeypatch)
    for threshold in (0.4, 1.0):
        expected = torch.tensor([x if x <= threshold else 1.0 for x in factors])
        result = bdfast.purify(trained, clean, method=IMSDefense(threshold=threshold))
        rows = expected if scaled else expected.view(-1, 1, 1, 1)
        for name, x in result.model.state_dict().items():
            start = trained.state_dict()[name]
            if name in (f"{scaled}.weight", f"{scaled}.bias"):
                start = start * (rows if name.endswith("weight") else expected)
            torch.testing.assert_close(x, start, rtol=1e-5, atol=1e-7)
        assert torch.equal(result.neurons, expected.le(threshold))


def test_factors_up_to_the_threshold_are_applied(trained, clean, monkeypatch):
    factors = [1.0, 0.45, 0.1, 0.9, 0.25, 0.04, 0.35, 0.7]
    with_factors(trained, channel_index(trained, None), factors, monkeypatch)
    ims, data = IMSDefense(), Batches(clean, device="cpu")
    scores = ims.rank(trained, data, run())
    assert ims.strengths(scores)[-2:] == [pytest.approx(0.1), 1.0]
    for strength in (0.04, 0.3, 0.9, *ims.strengths(scores)):
        model = copy.deepcopy(trained)
        ims.apply(model, scores, strength, data, run())
        expected = torch.tensor([x if x <= strength else 1.0 for x in factors])
        for got, given in ((model[1].weight, trained[1].weight), (model[1].bias, trained[1].bias)):
            torch.testing.assert_close(got, given * expected, rtol=1e-5, atol=1e-7)


def test_purify_with_and_without_a_threshold(trained, clean):
    options = {"first_rounds": 2, "rounds": 2, "steps": 2, "lr": 0.3}
    given = bdfast.purify(trained, clean, method=IMSDefense(**options, threshold=1.0))
    stages = ["masks"] * 2 + ["masks, with changes"] * 2 + ["masks, sparse"] * 2
    assert [row.stage for row in given.history if hasattr(row, "stage")] == stages
    assert given.verdict is None
    assert given.neurons.all()
    found = bdfast.purify(trained, clean.subset(torch.arange(24)), method=IMSDefense(**options))
    assert found.options["threshold"] in (None, 1.0, *found.scores.values.neg().add(1).tolist())


def test_other_networks():
    torch.manual_seed(0)
    data = TensorDataset(images().tensors[0].float(), images().tensors[1])
    options = {"first_rounds": 2, "rounds": 2, "steps": 1, "lr": 0.4, "threshold": 1.0, "sparsity": 0.0}
    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    networks = [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=4), nn.Flatten(), nn.Linear(4, 3)),
        nn.Sequential(nn.Flatten(1, 2), block, nn.Flatten(), nn.Linear(16, 3)),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)),
    ]
    for model, kind in zip(networks, ("conv", "norm", "linear"), strict=True):
        result = bdfast.purify(model, data, method=IMSDefense(**options), amp=False, augment=None)
        assert float(result.scores.values.max()) > 0
        assert {layer.kind for layer in result.scores.layers} == {kind}


def test_other_batches_are_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("bdfast.defenses.pruning.Judge", None)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    rows = TensorDataset(torch.rand(12, 4), torch.arange(12) % 2)
    with pytest.raises(ValueError, match=r"clean: expected batches of \(images \[B, C, H, W\], labels\)"):
        bdfast.purify(model, rows, method=IMSDefense(), augment=None)


COUNT, POSITIVE = "expected at least 1", "expected a positive number"
WRONG = [
    ("threshold", -0.1, "expected a share in"),
    *((name, 0, COUNT) for name in ("first_rounds", "rounds", "steps")),
    *((name, 0.0, POSITIVE) for name in ("lr", "step_size")),
    ("sparsity", -1.0, "expected at least 0"),
    ("bn", "recalibrate", "expected 'frozen', got 'recalibrate'"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_wrong_options(name, value, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        IMSDefense(**{name: value})
