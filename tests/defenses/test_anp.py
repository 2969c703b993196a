"""ANP against a plain transcription of its loop in float64, and what its masks mean."""

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
from bdfast.defenses.anp import ANPDefense
from bdfast.defenses.parts.masks import MaskedNetwork, channels_of, mask_scores, masked_at_most
from bdfast.neurons.channels import channel_index
from bdfast.training import Run
from bdfast.training.seeds import seeded

CPU = torch.device("cpu")


def network(*, normalised: bool = True) -> nn.Module:
    """Two normalisation layers, one without biases, or none; trained for a while."""
    with seeded(0, CPU):
        first, second = nn.BatchNorm2d(6), nn.GroupNorm(2, 4)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            first if normalised else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, padding=1, bias=False),
            second if normalised else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 3),
        ).double()
        with torch.no_grad():
            for norm in (first, second):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
        pixels, labels = images().tensors
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
    model.zero_grad()
    return model.eval()


def images(count: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 1, 4, 4, dtype=torch.float64, generator=generator)
    return TensorDataset(pixels, torch.randint(3, (count,), generator=generator))


def run() -> Run:
    return Run(amp=False, forward=task.normalized(task.default_forward))


def transcribed(model: nn.Module, pixels, scales: list, shifts: list) -> torch.Tensor:
    """The normalised network by hand, in training mode, with these factors on gamma and beta."""
    x = model[0](pixels)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    gamma, beta = model[1].weight * scales[0], model[1].bias * shifts[0]
    x = (x - mean) / torch.sqrt(var + model[1].eps) * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)
    x = model[3](x.clamp(min=0))
    groups = x.reshape(len(x), 2, -1)
    mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
    x = ((groups - mean) / torch.sqrt(var + model[4].eps)).reshape(x.shape)
    gamma, beta = model[4].weight * scales[1], model[4].bias * shifts[1]
    x = x * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)
    return model[7](x.clamp(min=0).flatten(1))


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize("steps", [1, 3])
def test_masks_are_those_of_the_published_loop(compat, steps):
    model, data, epochs, bound = network(), images(), 4, 0.4
    masks = [torch.ones(size, dtype=torch.float64, requires_grad=True) for size in (6, 4)]
    optimizer = torch.optim.SGD(masks, lr=1.0, momentum=0.9)
    farthest, clamped = 0.0, 0
    for pixels, labels in batches(data, 128, epochs, "masks"):
        noise = torch.empty(2, 10, dtype=torch.float64).uniform_(-bound, bound)
        deltas, xis = (list(part.split([6, 4])) for part in noise)
        for _ in range(steps):
            for part in (*deltas, *xis):
                part.requires_grad_()
            scales = [m.detach() + delta for m, delta in zip(masks, deltas, strict=True)]
            error = F.cross_entropy(transcribed(model, pixels, scales, [1 + xi for xi in xis]), labels)
            gradients = torch.autograd.grad(error, [*deltas, *xis])
            moved = []
            for part, gradient in zip([*deltas, *xis], gradients, strict=True):
                part = part.detach() + bound / steps * gradient.sign()
                moved.append(part if compat else part.clamp(-bound, bound))
            deltas, xis = moved[:2], moved[2:]
        farthest = max(farthest, *(float(part.abs().max()) for part in moved))
        optimizer.zero_grad()
        natural = F.cross_entropy(transcribed(model, pixels, masks, [1.0, 1.0]), labels)
        scales = [m + delta for m, delta in zip(masks, deltas, strict=True)]
        robust = F.cross_entropy(transcribed(model, pixels, scales, [1 + xi for xi in xis]), labels)
        (0.2 * natural + 0.8 * robust).backward()
        optimizer.step()
        with torch.no_grad():
            for mask in masks:
                clamped += int(((mask < 0) | (mask > 1)).sum())
                mask.clamp_(0, 1)
    with seeded(0, CPU):
        masked = ANPDefense(updates=epochs, lr=1.0, steps=steps, compat=compat).trained(
            model, Batches(data, device="cpu"), run()
        )
    expected = torch.cat(masks).detach()
    assert float((masked.masks.detach() - expected).abs().max()) < 1e-10
    # Without these cases the loops would agree whatever they did in them.
    assert float((1 - expected).max()) > 0.1
    assert clamped > 0
    assert (farthest > 1.2 * bound) if compat else (farthest <= bound)


def test_only_masks_move_and_the_model_stays():
    model, data = network(), Batches(images(), device="cpu")
    before = copy.deepcopy(model.state_dict())
    masked = ANPDefense(updates=2).trained(model, data, run())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    for (name, x), y in zip(masked.network.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert x.grad is None
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.2, 0.3, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_at_the_threshold_goes(threshold, dtype):
    index = channel_index(nn.BatchNorm1d(3), None)
    at = torch.tensor(threshold, dtype=dtype)
    masks = torch.stack([at, (at - 1e-6).clamp(min=0), at + 1e-6])
    assert masked_at_most(mask_scores(masks, index), threshold).tolist() == [True, True, False]


def test_official_masks_have_four_decimals(monkeypatch):
    """A mask of 0.20004 is stored as 0.2000, which is at most 0.2."""
    masked = MaskedNetwork(nn.BatchNorm1d(4), channel_index(nn.BatchNorm1d(4), None))
    masked.masks.data.copy_(torch.tensor([0.20004, 0.20006, 0.2, 1.0]))
    monkeypatch.setattr(ANPDefense, "trained", lambda *_: masked)
    for compat, expected in ((None, [False, False, True, False]), ("official", [True, False, True, False])):
        anp = ANPDefense(compat=compat)
        assert anp.chosen(anp.rank(None, None, None), 0.2).tolist() == expected


def test_channels_above_the_threshold_stay(trained, clean, monkeypatch):
    """Scales go and biases stay; where nothing is below the threshold, nothing goes."""

    def masked(*_):
        result = MaskedNetwork(copy.deepcopy(trained), channel_index(trained, None))
        result.masks.data.copy_(torch.tensor([1.0, 0.5, 0.2, 0.9, 0.0, 1.0, 0.3, 1.0]))
        return result

    monkeypatch.setattr(ANPDefense, "trained", masked)
    for threshold, gone in ((0.2, [2, 4]), (0.5, [1, 2, 4, 6])):
        result = bdfast.purify(trained, clean, method=ANPDefense(threshold=threshold, bn="frozen"))
        assert result.neurons.nonzero().flatten().tolist() == gone
        kept = torch.ones(8)
        kept[gone] = 0
        assert torch.equal(result.model[1].weight, trained[1].weight * kept)
        assert torch.equal(result.model[1].bias, trained[1].bias)
        assert torch.equal(result.model[1].running_mean, trained[1].running_mean)
        assert torch.equal(result.model[4].weight, trained[4].weight)
        assert result.verdict is None
    monkeypatch.setattr(
        ANPDefense, "trained", lambda *_: MaskedNetwork(copy.deepcopy(trained), channel_index(trained, None))
    )
    result = bdfast.purify(copy.deepcopy(trained), clean, method=ANPDefense(threshold=0.9))
    assert not result.neurons.any()
    assert torch.equal(result.model[1].weight, trained[1].weight)


def test_purify_with_and_without_a_threshold(trained, clean):
    given = bdfast.purify(trained, clean, method=ANPDefense(threshold=0.5, updates=3))
    assert [row.stage for row in given.history if hasattr(row, "stage")] == ["masks"] * 3
    assert given.options["threshold"] == 0.5
    assert float(given.scores.values.min()) >= 0
    assert float(given.scores.values.max()) <= 1
    assert int(given.neurons.sum()) == int((given.scores.values >= 0.5).sum())
    found = bdfast.purify(trained, clean.subset(torch.arange(24)), method=ANPDefense(updates=3))
    assert found.verdict is not None
    assert found.options["threshold"] in (None, *found.scores.values.neg().add(1).tolist())


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.classifier = nn.Linear(8, 3)

    def forward(self, images):
        return self.classifier(self.block(self.embed(images.flatten(1).view(len(images), -1, 16))).mean(1))


NETWORKS = {
    "transformer": TransformerBlock(),
    "depthwise": nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 2, groups=4), nn.Flatten(), nn.Linear(4, 3)
    ),
    "transposed in groups": nn.Sequential(
        nn.ConvTranspose2d(1, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(216, 3)
    ),
    "1-D": nn.Sequential(
        nn.Flatten(2), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(4, 3),
    ),
    "3-D": nn.Sequential(
        nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 4, (1, 3, 3)), nn.InstanceNorm3d(4, affine=True), nn.Flatten(),
        nn.Linear(16, 3),
    ),
    "linear layers only": nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds(name):
    model, data = NETWORKS[name].float(), TensorDataset(images().tensors[0].float(), images().tensors[1])
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    result = bdfast.purify(
        model, data, method=ANPDefense(threshold=0.9999, updates=20, lr=1.0), amp=False, augment=None
    )
    assert len(result.scores) == len(channels_of(model, Batches(data, device="cpu"), run()))
    assert float(result.scores.values.max()) > 0
    rows = torch.cat([rows.abs().flatten(1).sum(1) for rows in result.scores.index.rows(result.model)])
    assert bool((rows[result.neurons] == 0).all())
    assert result.neurons.any()


def test_the_last_layer_is_no_channel_and_is_not_asked_for_where_there_are_scales():
    data = Batches(images(), device="cpu")
    index = channels_of(network(normalised=False), data, run())
    assert [layer.parameter for layer in index.layers] == ["0.weight", "3.weight"]
    without_last = nn.Sequential(nn.Conv2d(1, 3, 4), nn.BatchNorm2d(3), nn.Flatten()).double().eval()
    assert len(channels_of(without_last, data, run())) == 3
    with pytest.raises(ValueError, match="expected a linear layer whose outputs are the logits"):
        channels_of(nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()).double().eval(), data, run())


def test_factors_on_biases_reach_biases_alone():
    """Of a network without normalisation: W (m + delta), b (1 + xi)."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten()).double()
    masked = MaskedNetwork(copy.deepcopy(model), channel_index(model, None))
    batch = (torch.rand(3, 1, 2, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.long))
    factors, shifts = torch.tensor([0.5, 2.0]).double(), torch.tensor([0.0, 3.0]).double()
    logits, _ = masked.outputs(run(), batch, factors, shifts)
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    for sample, row in zip(batch[0], logits, strict=True):
        for unit in range(2):
            product = sum(float(weight[unit, 0, i, j] * sample[0, i, j]) for i in range(2) for j in range(2))
            expected = product * float(factors[unit]) + float(bias[unit] * shifts[unit])
            assert float(row[unit]) == pytest.approx(expected, abs=1e-12)
    assert all(torch.equal(x, y) for x, y in zip(masked.network.parameters(), model.parameters(), strict=True))


def test_a_loss_that_is_not_finite_ends_the_training():
    model, data = network(), images()
    data.tensors[0][3] = math.nan
    with pytest.raises(FloatingPointError, match="masks: expected a finite gradient"):
        ANPDefense(updates=2).trained(model, Batches(data, device="cpu"), run())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold: expected a share in"),
        ({"threshold": math.nan}, "threshold: expected a share in"),
        ({"updates": 0}, "updates: expected at least 1"),
        ({"lr": 0.0}, "lr: expected a positive number"),
        ({"bound": 0.0}, "bound: expected a positive number"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"clean_share": -0.1}, "clean_share: expected a share in"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ANPDefense(**options)
