"""Which weights share channels: a network whose channels are put into another order computes the same."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdfast.defenses.parts.channel_spaces import Traced, traced
from bdfast.models import ModelSpec
from bdfast.neurons import NeuronIndex
from bdfast.neurons.rules import split_neurons


class Residual(nn.Module):
    """Two additions, one of them in place, and a shortcut that is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 8, 3, 2, padding=1)
        self.shortcut = nn.Conv2d(6, 8, 1, 2)
        self.linear = nn.Linear(8 * 16, 4)

    def forward(self, x):
        x = self.stem(x)
        out = self.second(F.relu(self.first(x)))
        out += x
        return self.linear((self.third(F.relu(out)) + self.shortcut(out)).flatten(1))


class Gated(nn.Module):
    """Channels times a gate for each of them, and for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 6, 3), nn.Linear(6, 3), nn.Linear(3, 6)
        self.scale = nn.Parameter(torch.full((6, 1, 1), 0.5))
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        spots = x.mean(1, keepdim=True)[..., 1:-1, 1:-1]
        x = self.stem(x) * self.scale
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = x * gate.view(len(x), 6, 1, 1) * spots
        return self.linear(F.max_pool2d(F.pad(x, (1, 1)), 2).permute(0, 2, 3, 1).mean((1, 2)))


class Tangled(nn.Module):
    """What nobody can know the order of, between two layers."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(8, 8), nn.Linear(8, 4), between
        self.register_buffer("memory", torch.zeros(2, 8))

    def forward(self, x):
        x = x.flatten(1)[:, :8]
        return self.second(self.between(self, F.relu(self.first(x)), x))


class TwoRoles(nn.Module):
    """A weight whose rows are read in another way, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(F.relu(self.first(x))) * (x @ self.first.weight.T)[0, 0]


class TwoSizes(nn.Module):
    """A weight that reads channels of four positions, and channels of one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared, self.last = nn.Conv2d(3, 2, 7), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(F.relu(self.shared(F.relu(self.shared(self.conv(x).flatten(1))))))


class TwiceDepthwise(nn.Module):
    """A depthwise weight that also reads what has an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 6)

    def forward(self, x):
        return self.last(self.depthwise(self.first(x)) * self.depthwise(torch.cat([x, x], 1)).mean()).flatten(1)


def unseen(_, x, __):
    with torch._C.DisableTorchFunction():  # as in compiled code
        return x.flip(1)


def remembered(model, x, inputs):
    model.memory[:] = inputs
    return model.memory + x


def remembered_in_a_view(model, x, inputs):
    model.memory.view(2, 8).copy_(inputs)
    return model.memory + x


TANGLED = {
    "concatenated": lambda _, x, __: torch.cat([x[:, 4:], x[:, :4]], 1),
    "indexed": lambda _, x, __: x[:, [1, 0, 3, 2, 5, 4, 7, 6]],
    "reshaped": lambda _, x, __: x.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8),
    "cumulative": lambda _, x, __: x.cumsum(1),
    "added to an input": lambda _, x, inputs: x + inputs.abs(),
    "outside": lambda _, x, __: torch.from_numpy(x.numpy()[:, ::-1].copy()),
    "unseen": unseen,
    "written into memory": remembered,
    "written into a view of memory": remembered_in_a_view,
}


def chain(convolution, pool, transposed, shape):
    return nn.Sequential(
        convolution(3, 6, 3, padding=1), nn.PReLU(6), transposed(6, 8, 2), pool(1), nn.Flatten(), nn.Linear(8, 4)
    ), shape


def small(arch: str, **options):
    return ModelSpec(num_classes=4, arch=arch, **options).build(), (3, 32, 32)


reused = nn.Linear(8, 8)
NETWORKS = {
    "1-D": (*chain(nn.Conv1d, nn.AdaptiveAvgPool1d, nn.ConvTranspose1d, (3, 8)), 2),
    "2-D": (*chain(nn.Conv2d, nn.AdaptiveMaxPool2d, nn.ConvTranspose2d, (3, 8, 8)), 2),
    "3-D": (*chain(nn.Conv3d, nn.AdaptiveAvgPool3d, nn.ConvTranspose3d, (3, 4, 4, 4)), 2),
    "residual": (Residual(), (3, 8, 8), 3),
    "gated": (Gated(), (3, 8, 8), 2),
    # One weight twice in a row: its inputs and its outputs are the same channels.
    "reused": (nn.Sequential(nn.Linear(3, 8), reused, nn.ReLU(), reused, nn.Linear(8, 4)), (3,), 1),
    "grouped": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 4, 8)), (3, 8, 8), 0),
    "preact_resnet18": (*small("preact_resnet18", width=4), 12),
    "small_vgg11": (*small("small_vgg11", width=4), None),
    "small_mobilenet_v2": (*small("small_mobilenet_v2", width=8), None),
    "small_vit": (*small("small_vit", width=16, depth=2), 2),
    "two roles": (TwoRoles(), (8,), 0),
    "two sizes": (TwoSizes(), (3, 8, 8), 0),
    "twice depthwise": (TwiceDepthwise(), (3, 8, 8), 0),
    **{name: (Tangled(between), (3, 8, 8), 0) for name, between in TANGLED.items()},
}


def found(model: nn.Module, x: torch.Tensor) -> Traced:
    return traced(model, NeuronIndex(model, kinds=("conv", "linear")), lambda: model(x), x)


@torch.no_grad()
@pytest.mark.parametrize("name", list(NETWORKS))
def test_channels_in_another_order_compute_the_same(name):
    model, shape, expected = NETWORKS[name]
    model.double().eval()
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.zero_()  # what belongs to a channel is the same for all of them, as no plan moves it
        elif parameter.ndim > 1 and key != "scale":
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    x = torch.rand(2, *shape, dtype=torch.float64)
    before = model(x)
    links, returned = found(model, x)
    orders = {}
    for link in links:
        if link.results is not None:
            orders.setdefault(link.results, torch.randperm(len(link.layer)))
    assert len(returned) == 1
    assert len(orders) == expected if expected is not None else len(orders) > 5
    named = dict(model.named_parameters(remove_duplicate=False))
    for link in links:
        (rows,) = split_neurons(named[link.layer.parameter], link.layer.split)
        if link.results is not None:
            rows.copy_(rows[orders[link.results]].clone())
        if link.sources is not None:
            order = orders[link.sources]
            places = torch.arange(len(order) * link.each).view(len(order), link.each)[order].flatten()
            rows.copy_(rows[:, places].clone())
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-12)
    assert before.std() > 1e-6


def test_a_flattened_map_is_read_position_by_position():
    links, returned = found(Residual().eval(), torch.rand(2, 3, 8, 8))
    by_name = {link.layer.parameter: link for link in links}
    assert by_name["linear.weight"].each == 16
    assert by_name["stem.weight"].sources is None
    assert by_name["stem.weight"].results == by_name["second.weight"].results == by_name["third.weight"].sources
    assert by_name["third.weight"].results == by_name["shortcut.weight"].results == by_name["linear.weight"].sources
    assert returned == {"linear.weight"}


def test_a_depthwise_convolution_follows_the_one_before_it():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1))
    first, depthwise, last = found(model.eval(), torch.rand(2, 3, 8, 8)).links
    assert first.owns
    assert not depthwise.owns
    assert first.results == depthwise.results == last.sources is not None
    # Behind what fixes the order, its own is fixed, too.
    model.insert(1, nn.PixelShuffle(1))
    links = found(model.eval(), torch.rand(2, 3, 8, 8)).links
    assert [link.results for link in links] == [None, None]


def test_a_weight_that_is_not_in_the_index_fixes_the_order():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 4)).eval()
    index = NeuronIndex(model, exclude="1")
    x = torch.rand(2, 3)
    links = traced(model, index, lambda: model(x), x).links
    assert [(link.layer.module, link.sources, link.results) for link in links] == [("0", None, None), ("2", None, None)]
