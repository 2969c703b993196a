"""The ways of exposing, each against a plain transcription in float64, and what they leave alone."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bdfast.data.batches import Batches
from bdfast.detectors.exposures import activation_pruning, channel_noise, standing
from bdfast.detectors.exposures.clean_unlearning import unlearned_clean
from bdfast.detectors.exposures.label_shuffling import shuffled_labels
from bdfast.detectors.exposures.retraining import Schedule
from bdfast.training import Run
from bdfast.training.seeds import derived_seed, seeded

BATCH, CLASSES, STAGE = 15, 4, "expose"
CPU = torch.device("cpu")


def images() -> TensorDataset:
    with seeded(0, CPU):
        return TensorDataset(torch.rand(45, 1, 8, 8, dtype=torch.float64), torch.arange(45) % CLASSES)


def network(*, norm: bool = True) -> nn.Module:
    with seeded(1, CPU):
        first = [nn.Conv2d(1, 5, 3, 2), *([nn.BatchNorm2d(5)] if norm else []), nn.ReLU(), nn.Flatten()]
        model = nn.Sequential(*first, nn.Linear(45, 6), nn.ReLU(), nn.Linear(6, CLASSES)).double()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.train()(images().tensors[0])
        return model.eval()


def clean() -> Batches:
    return Batches(images(), device="cpu", batch_size=BATCH)


def drawn(epochs: int, stage: str = STAGE) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Epoch from 0 and batch, in the order of a run, with torch's generator as it is there."""
    for epoch in range(epochs):
        seed = derived_seed(0, stage, epoch + 1)
        torch.manual_seed(seed)
        for pixels, labels in clean().shuffled(seed):
            yield epoch, pixels, labels


def assert_same(model: nn.Module, expected: nn.Module, start: nn.Module) -> None:
    states = [x.state_dict() for x in (model, expected, start)]
    assert max(float((x - states[1][key]).abs().max()) for key, x in states[0].items()) < 1e-9
    assert max(float((x - states[2][key]).abs().max()) for key, x in states[0].items()) > 1e-3


def never(model: nn.Module) -> bool:
    return False


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("expose", [unlearned_clean, shuffled_labels])
def test_retraining_as_published(expose, train):
    start, expected = network(), network()
    optimizer = torch.optim.Adam(expected.parameters(), lr=1.0, weight_decay=5e-4)
    with seeded(0, CPU):
        for epoch, pixels, labels in drawn(3):
            optimizer.param_groups[0]["lr"] = 1e-3 * 1.1 ** (3 * epoch)  # three updates an epoch
            expected.train(train)
            logits = expected(pixels)
            ascends = expose is unlearned_clean
            targets = labels if ascends else torch.randint(CLASSES, labels.shape)
            loss = F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            (-loss if ascends else loss).backward()
            optimizer.step()
        run = Run(amp=False)
        found = expose(start, clean(), run, Schedule(9, 1e-3, 1.1, train), never, STAGE)
    assert_same(found, expected, start)
    assert run.updates == 9


def test_a_retraining_ends_when_it_is_told():
    seen = []
    run = Run(amp=False)
    schedule = Schedule(30, 1e-3, 1.0, False)
    unlearned_clean(network(), clean(), run, schedule, lambda model: seen.append(model) or len(seen) == 2, STAGE)
    assert (len(seen), run.updates) == (2, 6)


def test_frozen_weights_move_too():
    """Of the copy."""
    model = network().requires_grad_(False)
    found = unlearned_clean(model, clean(), Run(amp=False), Schedule(3, 1e-3, 1.0, False), never, STAGE)
    assert all(not torch.equal(x, y) for x, y in zip(model.parameters(), found.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("direction", ["least", "most"])
@pytest.mark.parametrize("layer", [None, "0", "4"])
def test_pruning_as_published(direction, layer):
    """Features are the inputs of the last layer; a named layer has its outputs set to 0."""
    start, expected = network(), network()
    pixels = images().tensors[0]
    with torch.no_grad():
        if layer is None:
            activity = start[:6](pixels).mean(0)  # after a ReLU
        else:
            activity = (start[:1] if layer == "0" else start[:5])(pixels).abs().transpose(0, 1).flatten(1).mean(1)
        order = activity.argsort(descending=direction == "most")
        for unit in order[: round(0.4 * len(order))].tolist():
            if layer is None:
                expected[6].weight[:, unit] = 0
            else:
                expected.get_submodule(layer).weight[unit] = 0
                expected.get_submodule(layer).bias[unit] = 0
    found = activation_pruning.pruned(
        start, clean(), Run(amp=False), direction=direction, layer=layer, ended=never, shares=(0.2, 0.4)
    )
    assert all(torch.equal(x, expected.state_dict()[key]) for key, x in found.state_dict().items())
    assert not torch.equal(found(pixels), start(pixels))


def test_pruning_ends_when_it_is_told():
    zeros = []

    def ended(model: nn.Module) -> bool:
        zeros.append(int((model[6].weight == 0).all(0).sum()))
        return len(zeros) == 3

    activation_pruning.pruned(network(), clean(), Run(amp=False), direction="least", layer=None, ended=ended)
    assert zeros == [1, 1, 2]  # of six, for .1, .2 and .3


class NoisyNorm(nn.Module):
    """BatchNorm with noise on its scale and bias."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm, self.noise = norm, torch.zeros(2, norm.num_features, dtype=torch.float64, requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm
        scale, bias = n.weight * (1 + self.noise[0]), n.bias * (1 + self.noise[1])
        return F.batch_norm(x, n.running_mean, n.running_var, scale, bias, self.training, 0.1, n.eps)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("official", [False, True])
def test_noise_as_published(official, train):
    start, plain = network(), network()
    norm = plain[1]
    plain[1] = noisy = NoisyNorm(norm)
    with seeded(0, CPU):
        for budget in (0.2, 0.3):
            noisy.noise.data.uniform_(-budget, budget)
            for _, pixels, labels in drawn(6 if official else 2, f"{STAGE}, noise up to {budget}"):
                if official:
                    noisy.noise.data.uniform_(-budget, budget)
                plain.train(train)
                gradient = torch.autograd.grad(F.cross_entropy(plain(pixels), labels), noisy.noise)[0]
                noisy.noise.data += (0.2 if official else budget / 4) * gradient.sign()
                if not official:
                    noisy.noise.data.clamp_(-budget, budget)
    largest = float(noisy.noise.detach().abs().max())
    assert (0.3 < largest <= 0.5) if official else (0.1 < largest <= 0.3)
    with torch.no_grad():
        norm.weight *= 1 + noisy.noise[0]
        norm.bias *= 1 + noisy.noise[1]
    plain[1] = norm
    options = {"batch_statistics": train, "official": official, "budgets": (0.2, 0.3)}
    with seeded(0, CPU):
        found = channel_noise.noisy(start, clean(), Run(amp=False), ended=never, stage=STAGE, **options)
    moved = {key: x for key, x in found.state_dict().items() if "num_batches" not in key}
    assert max(float((x - plain.state_dict()[key]).abs().max()) for key, x in moved.items()) < 1e-9
    changed = {key for key, x in moved.items() if not torch.equal(x, start.state_dict()[key])}
    assert changed == {"1.weight", "1.bias"} | ({"1.running_mean", "1.running_var"} if train else set())


def test_noise_without_normalisation_is_on_units_before_the_classifier():
    start = network(norm=False)
    looks = []

    def ended(model: nn.Module) -> bool:
        looks.append(copy.deepcopy(model))
        return True

    with seeded(0, CPU):
        options = {"batch_statistics": False, "ended": ended, "stage": STAGE}
        found = channel_noise.noisy(start, clean(), Run(amp=False), **options)
    changed = {key for key, x in found.state_dict().items() if not torch.equal(x, start.state_dict()[key])}
    assert changed == {"0.weight", "0.bias", "3.weight", "3.bias"}
    factors = (found[0].weight / start[0].weight).detach()
    assert float((factors - factors[:, :, :1, :1]).abs().max()) < 1e-9
    assert 0 < float((factors - 1).abs().max()) <= 0.1 + 1e-9
    assert len(looks) == 1
    pixels = images().tensors[0]
    torch.testing.assert_close(looks[0](pixels), found(pixels))


def test_what_cannot_be_pruned():
    def prune(model: nn.Module, layer: str | None) -> nn.Module:
        return activation_pruning.pruned(model, clean(), Run(amp=False), direction="least", layer=layer, ended=never)

    for layer in ("1", "9"):
        with pytest.raises(ValueError, match=r"^layer: expected the name of a linear or convolution layer"):
            prune(network(), layer)
    headless = nn.Sequential(nn.Conv2d(1, CLASSES, 8), nn.Flatten()).double()
    with pytest.raises(ValueError, match=r"^model: expected a linear layer whose outputs are the logits"):
        prune(headless, None)
    unused = network()
    unused[2].register_module("spare", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^layer: expected a layer that runs"):
        prune(unused, "2.spare")


def test_non_finite_gradients_are_refused():
    model = network()
    model[6].bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="expected a finite gradient"):
        unlearned_clean(model, clean(), Run(amp=False), Schedule(3, 1e-3, 1.0, False), never, STAGE)


def test_counts_of_predictions():
    model, (pixels, labels) = network(), images().tensors
    labels = torch.where(torch.arange(45) % 5 == 0, -100, labels)
    data = Batches(TensorDataset(pixels, labels), device="cpu", batch_size=7)
    predicted, wrong, kept = ([0] * CLASSES for _ in range(3))
    for answer, label in zip(model(pixels).argmax(1).tolist(), labels.tolist(), strict=True):
        if label >= 0:
            predicted[answer] += 1
            wrong[answer] += answer != label
            kept[label] += 1
    found = standing.standing_of(model.train(), data, Run(amp=False))
    assert model.training
    assert [x.tolist() for x in (found.predicted, found.wrong, found.labels)] == [predicted, wrong, kept]
    assert sum(kept) == 36
    assert found.accuracy == pytest.approx(1 - sum(wrong) / 36)
    assert found.constant_answer == max(kept) / 36
    assert found.shares == pytest.approx([x / 36 for x in predicted])
    assert found.wrong_shares == pytest.approx([x / sum(wrong) for x in wrong])
    assert (found + found).predicted.tolist() == [2 * x for x in predicted]


def test_no_label_counts():
    data = TensorDataset(images().tensors[0], torch.full((45,), -100))
    with pytest.raises(ValueError, match="expected labels that count"):
        standing.standing_of(network(), Batches(data, device="cpu"), Run(amp=False))


def test_when_an_exposure_ends():
    model = network()
    now = standing.standing_of(model, clean(), Run(amp=False))
    most = max(now.shares)
    for floor, share, ends in [(now.accuracy, None, True), (now.accuracy - 1e-9, None, False), (0.0, most, False)]:
        assert standing.ended_at(floor, clean(), Run(amp=False), most_share=share)(model) == ends
    assert standing.ended_at(-1.0, clean(), Run(amp=False), most_share=most - 1e-9)(model)
