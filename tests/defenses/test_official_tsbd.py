"""TSBD's `compat="official"` against a plain transcription of the published script, from end to end."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batches
from bdfast.defenses import TSBDDefense
from bdfast.defenses.preflight import TRIED
from bdfast.models import PreActResNet18
from bdfast.neurons import NeuronIndex, neuron_weight_change, reinitialize
from bdfast.training import Run
from bdfast.training.seeds import seeded

N, M, R, ALPHA, UNLEARN_LR, LR, BATCH = 0.4, 0.7, 0.05, 0.7, 1e-3, 0.01, 8


class Residual(nn.Module):
    """Two convolutions, and one each of the two names under which shortcuts go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 5, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(5)
        self.downsample = nn.Conv2d(5, 6, 1)
        self.shortcut = nn.Sequential(nn.Conv2d(5, 6, 1))
        self.conv2 = nn.Conv2d(5, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x) + self.downsample(x) + self.shortcut(x)))
        return self.linear(x.mean((2, 3)))


def network(clean: TensorDataset) -> nn.Module:
    """Trained for a while, so that it has something to unlearn."""
    torch.manual_seed(0)
    model = Residual().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(clean.tensors[0]), clean.tensors[1]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def clean():
    """Twelve classes, so that a constant answer is right for less than a tenth; the last batch is a smaller one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(60, generator=generator) % 12
    images = torch.rand(60, 1, 6, 6, dtype=torch.float64, generator=generator) + 0.3 * labels.view(-1, 1, 1, 1)
    return TensorDataset(images, labels)


def batches(clean: TensorDataset):
    """Neither stage of the published script shuffles."""
    return list(zip(*(x.split(BATCH) for x in clean.tensors), strict=True))


@torch.no_grad()
def accuracy(model: nn.Module, clean: TensorDataset) -> float:
    model.eval()
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(clean)) / len(clean)


def unlearned(original: nn.Module, clean: TensorDataset) -> tuple[nn.Module, int]:
    model = copy.deepcopy(original)
    optimizer = torch.optim.SGD(model.parameters(), lr=UNLEARN_LR, momentum=0.9)
    for epoch in range(1, 1001):
        model.train()
        for images, labels in batches(clean):
            optimizer.zero_grad()
            (-F.cross_entropy(model(images), labels)).backward()
            optimizer.step()
        if accuracy(model, clean) <= 0.10:
            return model, epoch
    raise AssertionError("it never fell to a tenth")


def reinitialized(original: nn.Module, changed: nn.Module) -> nn.Module:
    result = copy.deepcopy(original)
    before, after = result.state_dict(), changed.state_dict()
    layers = [
        f"{name}.weight"
        for name, module in original.named_modules()
        if isinstance(module, nn.Conv2d) and "shortcut" not in name
    ]
    changes = {(name, row): x for name in layers for row, x in enumerate((after[name] - before[name]).abs().flatten(1))}
    neurons = sorted(changes, key=lambda neuron: float(f"{changes[neuron].sum():.4f}"), reverse=True)
    neurons = neurons[: int(len(neurons) * N)]
    pool = sorted(torch.cat([changes[neuron] for neuron in neurons]).tolist(), reverse=True)
    threshold = pool[: int(len(pool) * M)][-1]
    for name, row in neurons:
        before[name][row].view(-1)[changes[name, row] >= threshold] = 0.0
    return result


def fine_tuned(model: nn.Module, clean: TensorDataset) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for _ in range(20 + 1):
        model.train()
        for images, labels in batches(clean):
            neighbour = copy.deepcopy(model)
            neighbour.zero_grad()
            F.cross_entropy(neighbour(images), labels).backward()
            first = [p.grad.clone() for p in neighbour.parameters()]
            with torch.no_grad():
                for p, g in zip(neighbour.parameters(), first, strict=True):
                    p.add_(R * g / g.norm())
            neighbour.zero_grad()
            F.cross_entropy(neighbour(images), labels).backward()
            optimizer.zero_grad()
            for p, q, g in zip(model.parameters(), neighbour.parameters(), first, strict=True):
                p.grad = (1 - ALPHA) * g + ALPHA * q.grad
            optimizer.step()
            with torch.no_grad():
                model(images)
    return model


def settings(**changes):
    """The published ones, on images as they are and small batches, unlearning within a few epochs."""
    return {
        "method": "tsbd",
        **TSBDDefense.PUBLISHED,
        "unlearn_lr": UNLEARN_LR,
        "batch_size": BATCH,
        "augment": None,
        **changes,
    }


def test_end_to_end(clean):
    original = network(clean)
    changed, epochs = unlearned(original, clean)
    zeroed = reinitialized(original, changed)
    expected = fine_tuned(copy.deepcopy(zeroed), clean).state_dict()
    result = bdfast.purify(original, clean, n=N, **settings())
    actual = result.model.state_dict()
    assert max(float((actual[name] - x).abs().max()) for name, x in expected.items()) < 1e-9
    # Something has happened: several epochs of unlearning, zeroed weights, a way.
    stages = [getattr(row, "stage", "") for row in result.history]
    assert (stages.count("unlearn"), stages.count("fine-tune")) == (epochs, 21)
    assert epochs > 1
    assert any((x == 0).any() for x in zeroed.state_dict().values())
    assert max(float((x - original.state_dict()[name]).abs().max()) for name, x in expected.items()) > 0.1


def test_changes_that_agree_in_four_decimals_rank_as_the_layers_stand():
    changed = nn.Conv2d(1, 2, 1, bias=False)
    given = copy.deepcopy(changed)
    with torch.no_grad():
        changed.weight += torch.tensor([0.50001, 0.50004]).view(2, 1, 1, 1)
    scores = neuron_weight_change(changed, given)
    for compat, first in (("official", 0), (None, 1)):
        done = reinitialize(copy.deepcopy(given), scores, n=0.5, m=1.0, changed=(changed, given), compat=compat)
        assert done.neurons.tolist() == [first == 0, first == 1]


def constant(right: int, of: int = 40) -> tuple[nn.Module, TensorDataset]:
    """A network that always says 0, and images of which so many are a 0."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[2].bias[0] = 1.0
    return model, TensorDataset(torch.rand(of, 1, 1, 1).double(), (torch.arange(of) >= right).long())


@pytest.mark.parametrize(("right", "epochs"), [(4, 1), (5, 3)])
def test_unlearning_ends_at_a_tenth_of_all_images_and_never_fails(right, epochs):
    """Exactly a tenth is enough; with more it ends with its epochs, as the published code does, and goes on."""
    model, data = constant(right)
    run = Run(amp=False)
    with seeded(0, torch.device("cpu")):
        TSBDDefense(compat="official", unlearn_lr=1e-9, unlearn_epochs=3).unlearn(
            model, Batches(data, device="cpu", batch_size=BATCH), run
        )
    assert [row.epoch for row in run.history] == list(range(1, epochs + 1))


def flipped(images: torch.Tensor) -> torch.Tensor:
    return images.flip(3)


def test_the_end_is_judged_on_augmented_images_in_eval_mode_and_their_own_order(clean):
    seen = []

    def forward(model, batch):
        seen.append((model.training, batch[0]))
        return model(batch[0]), batch[1]

    defense = TSBDDefense(compat="official", unlearn_lr=1e-12, unlearn_epochs=2)
    with seeded(0, torch.device("cpu")):
        data = Batches(clean, device="cpu", batch_size=BATCH).unshuffled()
        defense.unlearn(network(clean), data, Run(amp=False, augment=flipped, forward=forward))
    steps = len(batches(clean))
    assert [training for training, _ in seen] == 2 * (steps * [True] + steps * [False])
    for turn in range(4):
        read = torch.cat([images for _, images in seen[turn * steps : (turn + 1) * steps]])
        assert torch.equal(read, flipped(clean.tensors[0]))


def test_of_shortcuts_only_those_are_left_out_that_say_so():
    """The names in torchvision, in the networks of the field, and a block that has both."""
    torchvision = pytest.importorskip("torchvision").models.resnet18()
    assert len(NeuronIndex.in_scope(torchvision, "conv", compat="official")) == 4800
    assert len(NeuronIndex.in_scope(torchvision, "conv")) == 3904
    assert len(NeuronIndex.in_scope(PreActResNet18(10), "conv", compat="official")) == 3904
    names = {layer.module for layer in NeuronIndex.in_scope(Residual(), "conv", compat="official").layers}
    assert names == {"conv1", "conv2", "downsample"}


class Killed(Exception):
    pass


counted = {}


def counting(model, batch):
    """Counts the training passes after those before the first update; a run is told by the code of this function."""
    if model.training:
        counted["passes"] += 1
        if counted["most"] is not None and counted["passes"] > counted["most"]:
            raise Killed
    return model(batch[0]), batch[1]


@pytest.mark.parametrize("passes", [10, 20, 60])
def test_a_killed_run_resumes_to_the_same_bits(clean, tmp_path, passes):
    """In the first epoch of unlearning, in a later one, and in the fine-tuning; with images that are drawn anew."""

    def purified(workdir, most=None):
        counted.update(passes=-TRIED, most=most)
        changes = {"augment": Augmentation(shift=1, flip=True), "forward": counting, "workdir": workdir, "epochs": 3}
        return bdfast.purify(network(clean), clean, n=N, **settings(**changes))

    undisturbed = purified(None)
    with pytest.raises(Killed):
        purified(tmp_path, passes)
    resumed = purified(tmp_path)
    expected = undisturbed.model.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in resumed.model.state_dict().items())
    assert [row.stage for row in resumed.history[1:]] == [row.stage for row in undisturbed.history[1:]]
