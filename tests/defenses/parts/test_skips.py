"""Which sums of a network are skips."""

import pytest
import torch
import torchvision
from networks_with_skips import Of, branch, built, convolutions, images, skips_of
from torch import nn

from bdfast.defenses.parts.skips import Skip, find_skips
from bdfast.models import PreActResNet18, SmallConvNeXt, SmallMobileNetV2, SmallVGG


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: SmallMobileNetV2(5, width=4), 10),
        (lambda: SmallConvNeXt(5, width=4, depth=1), 6),
        (lambda: SmallVGG(5, depth=11, width=4), 0),
        (lambda: SmallVGG(5, depth=11, width=4, batch_norm=False), 0),
        (lambda: torchvision.models.regnet_y_400mf(num_classes=5), 16),
        (lambda: torchvision.models.efficientnet_b0(num_classes=5), 9),
        (lambda: torchvision.models.swin_t(num_classes=5), 24),
        (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5), 0),
    ],
)
def test_as_many_skips_as_the_network_has(make, count):
    model = make().eval()
    assert len(skips_of(model, images(32).float())) == count


def test_what_a_skip_says():
    model = built(lambda: PreActResNet18(5, width=4))
    skips = skips_of(model, images())
    assert [skip.module for skip in skips] == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert [skip.parameters for skip in skips if skip.parameters] == [
        (f"layer{i}.0.shortcut.0.weight",) for i in (2, 3, 4)
    ]
    other = built(lambda: torchvision.models.resnet18(num_classes=5))
    assert skips_of(other, images())[2] == Skip(
        "layer2.0", 0, 1, 1, ("layer2.0.downsample.1.weight", "layer2.0.downsample.1.bias")
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


NO_SKIP = {
    "a parameter": lambda model, x: branch(model, x, 0) + model.parameter,
    "a constant": lambda model, x: branch(model, x, 0) + torch.ones(x.shape),
    "noise": lambda model, x: branch(model, x, 0) + 0 * torch.rand_like(branch(model, x, 0)),
    "branches alike": lambda model, x: branch(model, x, 0, 1) + branch(model, x, 2, 3),
    "a branch of two layers": lambda model, x: branch(model, x, 0, 1, 2) + branch(model, x, 3, 4),
    "no layer": lambda model, x: x + torch.tanh(x),
    "another shape": lambda model, x: branch(model, x, 0) + x.mean((2, 3), keepdim=True),
    "a number": lambda model, x: branch(model, x, 0) + 1,
    "whole numbers": lambda model, x: (branch(model, x, 0).long() + x.long()).float(),
    "one dimension": lambda model, x: branch(model, x, 0).flatten() + x.flatten(),
    "a sum of biases": lambda model, x: x * (model.parameter + model.parameter.tanh()),
}


@pytest.mark.parametrize("name", NO_SKIP)
def test_what_is_no_skip(name):
    assert skips_of(Of(NO_SKIP[name], *convolutions(5)), images().float()) == []


def test_another_input_is_no_skip():
    model = Of(lambda model, x, y: branch(model, x, 0, 1) + y, *convolutions(2))
    x, y = images().float().split(1)
    assert find_skips(model, lambda: model(x, y)) == []


def test_weights_that_serve_something_else_are_left_alone():
    def used_twice(model, x):
        skip = model.layers[0](x)
        return branch(model, x, 1, 2) + skip + 0 * skip.mean()

    def applied_twice(model, x):
        x = model.layers[0](x)
        return branch(model, x, 1, 2) + model.layers[0](x)

    def normalised(model, x):
        return branch(model, x, 1, 2) + torch.tanh(model.layers[0](x))

    def on_its_own(model, x):
        return branch(model, x, 1, 2) + model.layers[0](x)

    for function, parameters in (
        (used_twice, ()),
        (applied_twice, ()),
        (normalised, ()),
        (on_its_own, ("layers.0.weight", "layers.0.bias")),
    ):
        model = Of(function, *convolutions(3))
        (skip,) = skips_of(model, images().float())
        assert skip.parameters == parameters, function.__name__
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    model = Of(on_its_own, weight_norm, *convolutions(2))
    (skip,) = skips_of(model, images().float())
    assert skip.parameters == ()
