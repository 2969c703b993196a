"""CLP: the norms of channels, which BatchNorm belongs to which convolution, and what is pruned without an image."""

import pytest
import torch
import torchvision
from torch import nn

import bdfast
from bdfast.defenses.clp import CLPDefense, channel_norms
from bdfast.models import ModelSpec
from bdfast.training.copies import copy_of


@pytest.mark.parametrize(
    "shape", [(7, 5, 3, 3), (6, 2, 5, 5), (4, 9, 1, 1), (3, 1, 3, 3), (5, 8), (4, 3, 7), (2, 4, 2, 2, 2)]
)
def test_the_norm_of_a_channel_is_its_largest_singular_value(shape):
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [torch.linalg.svdvals(channel.reshape(shape[1], -1)).max() for channel in weight]
    torch.testing.assert_close(channel_norms(weight), torch.stack(expected), rtol=1e-12, atol=0)
    assert channel_norms(torch.zeros(shape)).tolist() == [0.0] * shape[0]


def stirred(model: nn.Module) -> nn.Module:
    """With BatchNorm scales and statistics that differ."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.1, 2, generator=generator)
            module.bias.data.normal_(generator=generator)
            module.running_var.uniform_(0.5, 4, generator=generator)
    return model.double().eval()


def published(model: nn.Module, u: float) -> nn.Module:
    """The loop of the published code: a singular value decomposition for each channel."""
    model = copy_of(model)
    convolution = None
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            convolution = module
        elif (
            isinstance(module, nn.BatchNorm2d)
            and convolution is not None
            and len(convolution.weight) == len(module.weight)
        ):
            bounds = []
            for channel in range(len(module.weight)):
                kernel = convolution.weight[channel].reshape(convolution.weight.shape[1], -1)
                factor = module.weight[channel] / (module.running_var[channel] + module.eps).sqrt()
                bounds.append(torch.linalg.svdvals(kernel * factor.abs()).max())
            bounds = torch.stack(bounds)
            for channel in range(len(bounds)):
                if bounds[channel] > bounds.mean() + u * bounds.std():
                    module.weight.data[channel] = 0
                    module.bias.data[channel] = 0
    return model


@pytest.mark.parametrize("u", [3.0, 1.0])
@pytest.mark.parametrize("arch", ["preact_resnet18", "small_vgg11_bn"])
def test_the_published_run(arch, u):
    torch.manual_seed(0)
    model = stirred(ModelSpec(arch=arch, width=8, num_classes=5).build())
    result = bdfast.purify(model, None, method=CLPDefense(**{**CLPDefense.PUBLISHED, "u": u}))
    expected = published(model, u)
    assert all(torch.equal(x, expected.state_dict()[name]) for name, x in result.model.state_dict().items())
    assert result.neurons_reset > 0
    assert result.options["u"] == u
    assert result.verdict is None


def test_a_shortcut_is_not_what_comes_before_the_next_block():
    model = ModelSpec(arch="preact_resnet18", width=8, num_classes=5).build()
    names = {id(module): name for name, module in model.named_modules()}

    def pairs(compat):
        return {norm: names[id(conv)] for norm, conv in CLPDefense(compat=compat).pairs(model).items()}

    (first,) = [norm for norm in pairs(None) if norm.endswith("layer2.1.bn1")]
    assert pairs(None)[first].endswith("layer2.0.conv2")
    assert pairs("official")[first].endswith("layer2.0.shortcut.0")
    model = torchvision.models.resnet18(num_classes=3)
    names = {id(module): name for name, module in model.named_modules()}
    found = pairs(None)
    assert found["layer2.0.downsample.1"] == "layer2.0.downsample.0"
    assert found["layer2.1.bn1"] == "layer2.1.conv1"
    assert len(found) == 20


@pytest.mark.parametrize("arch", ["small_vgg11", "small_vit", "small_convnext", "small_mobilenet_v2"])
def test_other_networks_without_an_image(arch):
    torch.manual_seed(0)
    model = ModelSpec(arch=arch, width=16, num_classes=5).build()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    result = bdfast.purify(model, None, method=CLPDefense(u=1.0))
    assert 0 < result.neurons_reset < len(result.scores) / 2
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    zero = sum(int((rows.flatten(1) == 0).all(1).sum()) for rows in result.scores.index.rows(result.model))
    assert zero == result.neurons_reset
    classifier = [module for module in result.model.modules() if isinstance(module, nn.Linear)][-1]
    assert not (classifier.weight == 0).all(1).any()


def test_with_images_how_many_go_is_chosen_on_them(trained, clean):
    result = bdfast.purify(trained, clean, method=CLPDefense(), amp=False)
    tried = [row.value for row in result.history if isinstance(row, bdfast.training.Probe)]
    assert all(row.option == "u" for row in result.history[1:])
    assert tried == sorted(tried, reverse=True)
    assert result.verdict is not None
    assert result.options["u"] in (None, *tried)


def test_a_method_that_needs_images_says_so(trained):
    with pytest.raises(ValueError, match=r"clean: expected images, without which ft cannot work, got None; .*\(.*clp"):
        bdfast.purify(trained, None, method="ft")
    with pytest.raises(ValueError, match="u: expected at least 0, got -1"):
        CLPDefense(u=-1)


def test_a_layer_of_one_channel_and_a_variance_of_zero():
    model = nn.Sequential(
        nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 2)
    )
    model[3].running_var.zero_()
    result = bdfast.purify(model, None, method=CLPDefense(u=1.0))
    assert result.scores.values.isfinite().all()
    assert not result.neurons[0]
