"""RNP: against a plain transcription of the published script; masks, thresholds, and networks of other kinds."""

import copy
from collections import Counter

import pytest
import torch
from published_runs import batches
from something_to_unlearn import images, purified, trained
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast.data.batches import Batches
from bdfast.defenses.parts.masks import SHARES, MaskedNetwork, channels_of, mask_scores
from bdfast.defenses.rnp import RNPDefense
from bdfast.neurons import NeuronIndex
from bdfast.training import Run
from bdfast.training.seeds import seeded

BATCH, CLASSES, THRESHOLD = 15, 6, 0.6


def network() -> nn.Module:
    with seeded(0, torch.device("cpu")):
        first = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        second = [nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(48, CLASSES)]
        return trained(nn.Sequential(*first, *second), images(CLASSES))


class MaskedNorm(nn.Module):
    """The published layer in the place of a BatchNorm."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm
        self.neuron_mask = nn.Parameter(torch.ones(norm.num_features, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        scale = self.neuron_mask * norm.weight
        return F.batch_norm(x, norm.running_mean, norm.running_var, scale, norm.bias, self.training, 0.1, norm.eps)


def published_masks(
    original: nn.Module, data: TensorDataset, lr: float, epochs: int, seen: Counter
) -> tuple[nn.Module, list[torch.Tensor]]:
    """The network after unlearning and recovery, and the masks of its layers."""
    model = copy.deepcopy(original).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[10, 20], gamma=0.1)
    steps = list(batches(data, BATCH, epochs, "unlearn"))
    in_epoch = len(steps) // epochs
    for epoch in range(epochs):
        hits = count = 0
        for pixels, labels in steps[epoch * in_epoch : (epoch + 1) * in_epoch]:
            optimizer.zero_grad()
            logits = model(pixels)
            (-F.cross_entropy(logits, labels)).backward()
            optimizer.step()
            hits, count = hits + int((logits.argmax(1) == labels).sum()), count + len(labels)
        schedule.step()
        seen["epochs"] += 1
        if hits / count <= 0.2:
            break
    for name in ("1", "4"):
        setattr(model, name, MaskedNorm(model.get_submodule(name)))
    masks = [model.get_parameter(f"{name}.neuron_mask") for name in ("1", "4")]
    optimizer = torch.optim.SGD(masks, lr=0.2, momentum=0.9)
    for pixels, labels in batches(data, BATCH, 20, "recover"):
        optimizer.zero_grad()
        (0.2 * F.cross_entropy(model(pixels), labels)).backward()
        optimizer.step()
        with torch.no_grad():
            for mask in masks:
                seen["below"] += int((mask < 0).sum())
                seen["above"] += int((mask > 1).sum())
                mask.clamp_(0, 1)
    return model, [mask.detach() for mask in masks]


@pytest.mark.parametrize(("lr", "epochs", "ended"), [(3e-3, 21, False), (1e-4, 22, True)], ids=["reached", "went on"])
def test_the_published_run(lr, epochs, ended):
    model, data, seen = network(), images(CLASSES), Counter()
    unlearned, masks = published_masks(model, data, lr, epochs, seen)
    assert (seen["epochs"] == epochs) == ended
    assert min(seen["below"], seen["above"]) > 0

    defense = RNPDefense(unlearn_lr=lr, unlearn_epochs=epochs, recover_lr=0.04, compat="official")
    run, clean = Run(amp=False), Batches(data, device="cpu", batch_size=BATCH)
    with seeded(0, clean.device):
        masked = MaskedNetwork(defense.forgetful(model, clean, run), channels_of(model, clean, run))
        defense.recover(masked, clean, run)
    torch.testing.assert_close(masked.masks.detach(), torch.cat(masks), rtol=0, atol=1e-9)
    # Neither all the same, nor all at the ends.
    assert float(torch.cat(masks).std()) > 0.05
    assert int(((torch.cat(masks) > 0) & (torch.cat(masks) < 1)).sum()) >= 3
    torch.testing.assert_close(masked.network[1].running_mean, unlearned[1].norm.running_mean, rtol=0, atol=1e-9)

    expected, pruned = copy.deepcopy(model), []
    for name, mask in zip(("1", "4"), masks, strict=True):
        for channel, value in enumerate(mask.tolist()):
            pruned.append(float(f"{value:.4f}") <= THRESHOLD)
            if pruned[-1]:
                expected.get_parameter(f"{name}.weight").data[channel] = 0.0
    assert 0 < sum(pruned) < len(pruned)
    result = purified(model, data, RNPDefense, BATCH, unlearn_lr=lr, unlearn_epochs=epochs, threshold=THRESHOLD)
    assert result.neurons.tolist() == pruned
    assert all(torch.equal(x, expected.state_dict()[name]) for name, x in result.model.state_dict().items())


def test_masks_at_the_threshold_go():
    defense = RNPDefense()
    for dtype in (torch.float32, torch.float64):
        for strength in (0.0, 0.05, 0.1, 0.3, 0.7, 0.9, 1.0):
            at = torch.tensor(strength, dtype=dtype)
            apart = torch.tensor([-1e-6, 0.0, 1e-6], dtype=dtype)
            norm = nn.BatchNorm1d(3)
            scores = mask_scores(at + apart, NeuronIndex(norm, kinds="norm"))
            assert defense.chosen(scores, strength).tolist() == [True, True, False]


@pytest.mark.parametrize(("compat", "expected"), [(None, [True, False, False]), ("official", [True, True, False])])
def test_the_published_masks_have_four_decimals(compat, expected, monkeypatch):
    def recover(self: RNPDefense, masked: MaskedNetwork, data: Batches, run: Run) -> None:
        masked.masks.data[:3] = torch.tensor([0.3, 0.30004, 0.30006], dtype=torch.float64)

    monkeypatch.setattr(RNPDefense, "recover", recover)
    monkeypatch.setattr(RNPDefense, "forgetful", lambda self, model, data, run: copy.deepcopy(model))
    result = bdfast.purify(network(), images(CLASSES), method=RNPDefense(threshold=0.3, compat=compat))
    assert result.neurons.tolist() == expected + 17 * [False]


def test_a_stronger_threshold_takes_more():
    masks = torch.rand(500, generator=torch.Generator().manual_seed(0))
    scores = mask_scores(masks, NeuronIndex(nn.BatchNorm1d(500), kinds="norm"))
    before = torch.zeros(500, dtype=torch.bool)
    strengths = RNPDefense().strengths(scores)
    for strength in strengths:
        chosen = RNPDefense().chosen(scores, strength)
        assert torch.equal(chosen, masks <= strength)
        assert not (before & ~chosen).any()
        before = chosen
    assert [int((masks <= strength).sum()) for strength in strengths] == [round(500 * share) for share in SHARES]


def test_only_the_masks_move():
    """Of the copy, its statistics too; of the model nothing."""
    model, data = network(), images(CLASSES)
    start = copy.deepcopy(model.state_dict())
    clean, run = Batches(data, device="cpu", batch_size=BATCH), Run(amp=False)
    defense = RNPDefense(recover_updates=6)
    with seeded(0, clean.device):
        forgetful = defense.forgetful(model, clean, run)
        before = copy.deepcopy(forgetful.state_dict())
        masked = MaskedNetwork(forgetful, channels_of(model, clean, run))
        defense.recover(masked, clean, run)
    moved = {name for name, x in masked.network.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {f"{i}.{name}" for i in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert 0 <= float(masked.masks.detach().min()) < float(masked.masks.detach().max()) <= 1
    assert [row.updates for row in run.history if row.stage == "recover"] == [1] * 6
    assert all(torch.equal(x, start[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Tokens(nn.Module):
    """LayerNorm and attention, and logits that no linear layer gives by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 12)
        self.block = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.head(self.block(self.embed(x.flatten(1, -2))).mean(1))


def convolutional_head() -> list[nn.Module]:
    return [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, CLASSES, 2), nn.Flatten()]


def grouped() -> list[nn.Module]:
    convolutions = [nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    return [*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(32, CLASSES)]


def transposed() -> list[nn.Module]:
    return [nn.ConvTranspose2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(100, CLASSES)]


def one_dimensional() -> list[nn.Module]:
    return [nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES)]


def three_dimensional() -> list[nn.Module]:
    return [nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, CLASSES)]


@pytest.mark.parametrize(
    ("layers", "shape", "channels"),
    [
        (lambda: [Tokens()], (1, 4, 4), ["0.block.norm1.weight", "0.block.norm2.weight"]),
        (convolutional_head, (1, 4, 4), ["1.weight"]),
        (grouped, (1, 4, 4), ["0.weight", "1.weight", "3.weight"]),
        (transposed, (1, 4, 4), ["0.weight"]),
        (one_dimensional, (4, 4), ["1.weight"]),
        (three_dimensional, (1, 4, 4, 4), ["0.weight"]),
    ],
)
def test_networks_of_other_kinds(layers, shape, channels):
    """Pruned channels lose their weights and nothing else changes, frozen as they may be."""
    data = images(CLASSES, shape)
    with seeded(0, torch.device("cpu")):
        model = trained(nn.Sequential(*layers()), data)
    next(model.parameters()).requires_grad_(False)
    options = {"threshold": 0.5, "bn": "frozen", "recover_lr": 0.5, "recover_updates": 20}
    result = bdfast.purify(model, data, method=RNPDefense(**options), batch_size=BATCH, augment=None)
    assert [x.parameter for x in result.scores.layers] == channels
    index = result.scores.index
    assert 0 < int(result.neurons.sum()) < len(index)
    rows = [row for view in index.rows(result.model) for row in view]
    originals = [row for view in index.rows(model) for row in view]
    for goes, row, original in zip(result.neurons.tolist(), rows, originals, strict=True):
        assert torch.equal(row, torch.zeros_like(row) if goes else original)
    others = {name: x for name, x in result.model.state_dict().items() if name not in channels}
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in others.items())


def test_a_network_whose_channels_cannot_be_told_is_refused():
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, CLASSES, 2), nn.Flatten()]
    model = trained(nn.Sequential(*layers), images(CLASSES))
    with pytest.raises(ValueError, match="expected a linear layer whose outputs are the logits"):
        bdfast.purify(model, images(CLASSES), method=RNPDefense(threshold=0.5))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_unlearned():
    model, data = network(), images(CLASSES)
    defense = RNPDefense(threshold=0.5, unlearn_lr=1e-9, unlearn_epochs=1)
    with pytest.raises(RuntimeError, match="unlearn_epochs: expected the clean accuracy to fall"):
        bdfast.purify(model, data, method=defense)
    one_class = TensorDataset(data.tensors[0], torch.zeros(60, dtype=torch.long))
    with pytest.raises(ValueError, match="better than a constant answer"):
        bdfast.purify(model, one_class, method=RNPDefense(threshold=0.5))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", 1.5),
        ("threshold", -0.1),
        ("recover_lr", 0.0),
        ("recover_updates", 0),
        ("unlearn_lr", -1.0),
        ("unlearn_to", -0.1),
        ("unlearn_epochs", 0),
        ("max_accuracy_drop", 0.0),
    ],
)
def test_options_that_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        RNPDefense(**{name: value})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_with_selection(trained, clean):
    result = bdfast.purify(trained, clean, method=RNPDefense(recover_updates=3))
    assert "threshold" in result.options
    assert result.verdict is not None
    assert [x.parameter for x in result.scores.layers] == ["1.weight"]
    threshold = result.options["threshold"]
    expected = 0 if threshold is None else int(RNPDefense().chosen(result.scores, threshold).sum())
    assert int(result.neurons.sum()) == expected
