"""NAD against a plain transcription in float64; which layers have attention maps."""

import copy

import pytest
import torch
from published_runs import assert_same, batches
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast.data.batches import Batches
from bdfast.defenses.nad import AttentionLoss, NADDefense
from bdfast.defenses.parts.attention import MapLayer, attention_maps, layers_with_maps
from bdfast.models import PreActResNet18, SmallConvNeXt, SmallMobileNetV2, SmallVGG, SmallViT
from bdfast.training import Run
from bdfast.training.seeds import seeded

BATCH = 8
ENDS = (2, 5, 8)
"""The layers of `network` that end a stage: the last outputs of 8, 4 and 2 pixels a side."""


def images(count: int = 40, side: int = 8, channels: int = 1, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, channels, side, side, dtype=dtype, generator=generator)
    return TensorDataset(pixels, torch.randint(3, (count,), generator=generator))


def network() -> nn.Module:
    with seeded(0, torch.device("cpu")):
        layers: list[nn.Module] = []
        for before, channels, stride in ((1, 6, 1), (6, 8, 2), (8, 10, 2)):
            layers += [nn.Conv2d(before, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(40, 3)).double().eval()


def layers_of(model: nn.Module, data: TensorDataset) -> list[MapLayer]:
    return layers_with_maps(model, Batches(data, device="cpu", batch_size=16), Run(amp=False))


def plain_map(features: torch.Tensor) -> torch.Tensor:
    """Of features [C, H, W], value by value."""
    height, width = features.shape[1:]
    sums = [[sum(abs(x) ** 2 for x in features[:, i, j]) for j in range(width)] for i in range(height)]
    length = sum(value**2 for row in sums for value in row) ** 0.5
    return torch.stack([value / (length + 1e-6) for row in sums for value in row])


def outputs(model: nn.Module, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The features at `ENDS`, and the logits."""
    features = []
    for index, layer in enumerate(model):
        pixels = layer(pixels)
        if index in ENDS:
            features.append(pixels)
    return features, pixels


def published_distance(features: list[torch.Tensor], of_teacher: list[torch.Tensor], beta: list[float]) -> torch.Tensor:
    distance = torch.zeros((), dtype=torch.float64)
    for ours, theirs, weight in zip(features, of_teacher, beta, strict=True):
        maps = [
            f.pow(2).sum(1, keepdim=True)
            / (f.pow(2).sum(1, keepdim=True).flatten(1).norm(dim=1)[:, None, None, None] + 1e-6)
            for f in (ours, theirs)
        ]
        distance = distance + weight * F.mse_loss(*maps)
    return distance


def test_the_published_run():
    """The teacher, then the student towards it, with SGD as published."""
    model, data, epochs, lr = network(), images(), 3, 0.01
    teacher, student = copy.deepcopy(model), copy.deepcopy(model)
    for stage, trained in (("teacher", teacher), ("fine-tune", student)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        teacher.eval()
        trained.train()
        for pixels, labels in batches(data, BATCH, epochs, stage):
            features, logits = outputs(trained, pixels)
            loss = F.cross_entropy(logits, labels)
            if trained is student:
                with torch.no_grad():
                    of_teacher = outputs(teacher, pixels)[0]
                loss = loss + published_distance(features, of_teacher, [500, 1000, 1000])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    settings = {**NADDefense.PUBLISHED, "lr": lr, "epochs": epochs}
    about = {name: settings.pop(name) for name in ("batch_size", "amp", "augment")}
    about |= {"batch_size": BATCH, "augment": None}
    result = bdfast.purify(model, data, method=NADDefense(**settings), **about)
    assert_same(result.model, student, model)
    assert result.found["attention_layers"] == [str(index) for index in ENDS]
    assert [row.stage for row in result.history[1:]] == ["teacher"] * epochs + ["fine-tune"] * epochs
    # The maps count: without them the student ends elsewhere.
    alone = bdfast.purify(model, data, method=NADDefense(**{**settings, "beta": 0.0}), **about).model.state_dict()
    assert max(float((alone[name] - x).abs().max()) for name, x in student.state_dict().items()) > 1e-3


def test_a_map_is_that_of_loops():
    model, (pixels, _) = network(), images(4).tensors
    layers = layers_of(model, images())
    assert [(layer.axis, layer.positions) for layer in layers] == [(1, (8, 8)), (1, (4, 4)), (1, (2, 2))]
    with attention_maps(model, layers) as maps:
        model(pixels)
    for layer, features in zip(layers, outputs(model, pixels)[0], strict=True):
        expected = torch.stack([plain_map(one) for one in features.detach()])
        torch.testing.assert_close(maps[layer.name].detach(), expected, rtol=0, atol=1e-12)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_map_of_tokens_sums_over_their_features():
    model = SmallViT(3, image_size=8, width=8, depth=3, in_channels=1, patch_size=2).double().eval()
    pixels, data = images(4).tensors[0], images()
    layers = layers_of(model, data)
    with attention_maps(model, layers) as maps:
        model(pixels)
    patches = model.patch_embed(pixels)
    tokens = torch.cat([model.cls_token.expand(4, -1, -1), patches], 1) + model.pos_embed
    for index, block in enumerate(model.blocks):
        tokens = block(tokens)
        expected = torch.stack([plain_map(one.T[:, :, None]) for one in tokens.detach()])
        torch.testing.assert_close(maps[f"blocks.{index}"].detach(), expected, rtol=0, atol=1e-12)


def test_a_map_of_zeros_has_a_gradient():
    """A dead layer is no NaN."""
    model, data = network(), images(8)
    layers = layers_of(model, data)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(-1)
    loss = AttentionLoss(Run(amp=False), teacher=teacher, layers=layers, beta=1000.0)
    result = loss(model, loss.prepare(data.tensors))
    result.loss.backward()
    assert float(result.loss.detach()) > 1
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_the_distance_weighs_fewer_maps_like_the_last_of_three():
    model, data = network(), images(8)
    layers = layers_of(model, data)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher[0].weight.mul_(-1)
    features, logits = outputs(model, data.tensors[0])
    of_teacher = outputs(teacher, data.tensors[0])[0]
    entropy = F.cross_entropy(logits, data.tensors[1])
    for count, weights in ((3, [4.0, 8.0, 8.0]), (2, [8.0, 8.0]), (1, [8.0])):
        loss = AttentionLoss(Run(amp=False), teacher=teacher, layers=layers[-count:], beta=8.0)
        actual = loss(model, loss.prepare(data.tensors)).loss
        expected = entropy + published_distance(features[-count:], of_teacher[-count:], weights)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        assert float(actual.detach()) > float(entropy.detach())


def test_one_pass_of_either_network_a_batch():
    model, data = network(), images(8)
    layers = layers_of(model, data)
    teacher = copy.deepcopy(model)
    seen = {"model": 0, "teacher": 0}

    def count(name):
        def hook(*_):
            seen[name] += 1

        return hook

    for name, one in (("model", model), ("teacher", teacher)):
        one[0].register_forward_hook(count(name))
    loss = AttentionLoss(Run(amp=False), teacher=teacher.train(), layers=layers, beta=1.0)
    statistics = teacher[1].running_mean.clone()
    loss(model, loss.prepare(data.tensors)).loss.backward()
    assert seen == {"model": 1, "teacher": 1}
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.equal(teacher[1].running_mean, statistics)
    assert teacher.training


class Sizes(nn.Module):
    """What the maps of networks with one or three axes of positions are found in."""

    def __init__(self, convolution: type[nn.Module], axes: int):
        super().__init__()
        self.axes = axes
        self.first = convolution(1, 4, 3, padding=1)
        self.second = convolution(4, 5, 3, stride=2, padding=1)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        x = x.flatten(2) if self.axes == 1 else x[:, :, None].repeat(1, 1, 4, 1, 1)
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(x.flatten(2).mean(2))


class WritesOver(nn.Module):
    """Its convolutions are changed in place once they are done."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu_(self.first(x))
        x = self.norm(self.second(x).add_(x))
        return self.last(x.mean((2, 3)))


NETWORKS = {
    "resnet": (lambda: PreActResNet18(3, width=2, in_channels=1), ["layer1", "layer2", "layer3"]),
    "vgg": (lambda: SmallVGG(3, depth=11, batch_norm=False, width=2, in_channels=1), None),
    "mobilenet": (lambda: SmallMobileNetV2(3, width=4, in_channels=1), ["features.3", "features.6", "features.13"]),
    "convnext": (lambda: SmallConvNeXt(3, width=2, depth=1, in_channels=1, patch_size=1), None),
    "vit": (
        lambda: SmallViT(3, image_size=8, width=8, depth=7, in_channels=1, patch_size=4),
        ["blocks.2", "blocks.4", "blocks.6"],
    ),
    "shallow vit": (
        lambda: SmallViT(3, image_size=8, width=8, depth=2, in_channels=1, patch_size=4),
        ["blocks.0", "blocks.1"],
    ),
    "one axis": (lambda: Sizes(nn.Conv1d, 1), ["first", "second"]),
    "three axes": (lambda: Sizes(nn.Conv3d, 3), ["first", "second"]),
    "in place": (WritesOver, ["norm"]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds(name):
    build, expected = NETWORKS[name]
    with seeded(0, torch.device("cpu")):
        model = build().eval()
    data = images(12, dtype=torch.float32)
    layers = layers_of(model, data)
    if expected is None:
        assert len(layers) == 3
    else:
        assert [layer.name for layer in layers] == expected
    if name in ("vgg", "convnext"):
        sizes = [layer.positions[0] for layer in layers]
        assert sizes == sorted(set(sizes), reverse=True)
        assert len(sizes) == 3
    result = bdfast.purify(model, data, method=NADDefense(lr=0.01, epochs=2), batch_size=6, amp=False)
    assert any(not torch.equal(x, y) for x, y in zip(result.model.parameters(), model.parameters(), strict=True))
    assert list(result.model.state_dict()) == list(model.state_dict())


class Skips(nn.Module):
    """Leaves a block out, in training mode."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(channels, 4, 3, padding=1) for channels in (1, 4, 4))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            if index != 1 or not self.training:
                x = torch.relu(block(x))
        return self.last(x.mean((2, 3)))


def test_a_block_that_is_skipped_in_training():
    with seeded(0, torch.device("cpu")):
        model = Skips().double().eval()
    data = images(8)
    layers = layers_of(model, data)
    assert len(layers) == 3
    loss = AttentionLoss(Run(amp=False), teacher=copy.deepcopy(model), layers=layers, beta=1.0)
    result = loss(model.train(), loss.prepare(data.tensors))
    with torch.no_grad():
        assert float(result.loss) > float(F.cross_entropy(model(data.tensors[0]), data.tensors[1]))


def test_with_selection(trained, clean):
    result = bdfast.purify(trained, clean, method=NADDefense(updates=4), amp=False)
    assert result.verdict is not None
    stages = [row.stage for row in result.history if hasattr(row, "stage")]
    trained_in = [stage for place, stage in enumerate(stages) if stage not in stages[:place]]
    assert trained_in[:4] == ["teacher at 0.01", "fine-tune at 0.01", "teacher at 0.03", "fine-tune at 0.03"]
    assert result.found["attention_layers"] == ["0", "1", "2"]
    assert not any(module._forward_hooks for module in result.model.modules())


def test_a_network_without_positions_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with pytest.raises(ValueError, match="model: expected layers whose outputs have positions"):
        layers_of(model, images())


@pytest.mark.parametrize(("option", "value"), [("beta", -1.0)])
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"{option}: expected"):
        NADDefense(**{option: value})
