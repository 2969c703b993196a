import pytest
import torch
from torch import nn

from bdfast.models import ModelSpec, PreActResNet18, normalized


def test_preact_resnet18_is_the_published_network():
    model = PreActResNet18(10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_171_146
    assert len(list(model.parameters())) == 54
    keys = list(model.state_dict())
    assert len(keys) == 102
    assert {"conv1.weight", "layer2.0.shortcut.0.weight", "layer4.1.bn2.running_var", "linear.bias"} <= set(keys)


@pytest.mark.parametrize(("stem", "size"), [("cifar", 32), ("stride2", 28), ("imagenet", 64)])
def test_any_width_and_stem(stem, size):
    model = PreActResNet18(7, width=4, in_channels=1, stem=stem).eval()
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


def test_normalized_takes_images_between_0_and_1():
    model = normalized(nn.Flatten(), mean=[0.5, 0.25], std=[0.5, 0.25])
    torch.testing.assert_close(model(torch.ones(1, 2, 1, 1)), torch.tensor([[1.0, 3.0]]))
    with pytest.raises(ValueError, match="std: expected 2 positive numbers"):
        normalized(nn.Flatten(), mean=[0.5, 0.25], std=[0.5, 0.0])


def test_spec_builds_own_and_torchvision_networks():
    spec = ModelSpec(num_classes=3, in_channels=1, width=4, mean=(0.3,), std=(0.4,))
    assert spec.build().eval()(torch.zeros(1, 1, 16, 16)).shape == (1, 3)
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert ModelSpec("squeezenet1_1", num_classes=5).build().eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("text", ["", "[]", '{"arch": "x"}', '{"mean": [], "std": [], "width": 0}', '{"mean": 3}'])
def test_hostile_descriptions_are_refused(text):
    with pytest.raises(ValueError, match="model description"):
        ModelSpec.from_json(text)


def test_unknown_names_are_suggested():
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        ModelSpec("resnet-18").build()
    with pytest.raises(ValueError, match="stem: expected one of cifar, stride2, imagenet"):
        PreActResNet18(10, stem="vgg")
