"""bdfast's own networks: what they compute, and that everything else in bdfast can handle them."""

import copy
import math

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.vgg import make_layers

from bdfast import neuron_weight_change
from bdfast.cli.inputs import ModelInput
from bdfast.io.checkpoints import read_description, save_weights
from bdfast.models import (
    ARCHITECTURES,
    ModelSpec,
    PreActResNet18,
    SmallConvNeXt,
    SmallMobileNetV2,
    SmallVGG,
    SmallViT,
)

NARROW = {"small_vit": {"width": 8, "depth": 2}, "small_convnext": {"width": 4, "depth": 1}}
IN_TIMM = {
    "conv_proj": "patch_embed.proj",
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.",
    "encoder.ln": "norm",
    "ln_": "norm",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
    "heads.head": "head",
}
every_arch = pytest.mark.parametrize("arch", list(ARCHITECTURES))


def narrow(arch, size=28, channels=1):
    torch.manual_seed(0)
    spec = ModelSpec(arch, 5, channels, image_size=size, **NARROW.get(arch, {"width": 4}))
    return spec, spec.build().eval()


def shapes(module):
    return {name: value.shape for name, value in module.state_dict().items()}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def randomised(module):
    """Values that a wrong order, scale or epsilon would show in; fresh ones are mostly 0 and 1."""
    torch.manual_seed(0)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(0.5 + 0.5 * torch.rand_like(value) if value.dim() == 1 else torch.randn_like(value) / 4)
    return module.eval()


@every_arch
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 32, 64])
def test_every_size_reaches_every_parameter(arch, size, channels):
    _, model = narrow(arch, size, channels)
    logits = model(torch.rand(3, channels, size, size))
    assert logits.shape == (3, 5)
    assert not torch.equal(logits[0], logits[1])
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_images_of_224_pixels():
    spec, model = narrow("small_vit", 224, 3)
    assert model.patch_embed.proj.stride == (16, 16)
    assert model(torch.rand(1, 3, 224, 224)).shape == (1, spec.num_classes)


@every_arch
def test_a_checkpoint_builds_the_same_network(arch, tmp_path):
    spec, model = narrow(arch)
    randomised(model)
    save_weights(model, tmp_path / "a.safetensors", description=spec.to_json())
    assert ModelSpec.from_json(read_description(tmp_path / "a.safetensors")) == spec
    loaded, described = ModelInput(tmp_path / "a.safetensors").load()
    assert described == spec
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(loaded.cpu().eval()(images), model(images))


@every_arch
def test_a_copy_shares_nothing_and_every_layer_has_neurons(arch):
    _, model = narrow(arch)
    images = torch.rand(2, 1, 28, 28)
    before = model(images)
    changed = copy.deepcopy(model)
    layers = {name: layer for name, layer in changed.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    with torch.no_grad():
        for layer in layers.values():
            layer.weight += 0.01
    assert torch.equal(model(images), before)
    scores = neuron_weight_change(changed, model)
    assert [layer.parameter for layer in scores.layers] == [f"{name}.weight" for name in layers]
    assert (scores.values > 0).all()


@pytest.mark.parametrize(
    ("own", "reference"),
    [
        (lambda: SmallVGG(10, depth=11, batch_norm=False).features, lambda: torchvision.models.vgg11().features),
        (lambda: SmallVGG(10, depth=11).features, lambda: torchvision.models.vgg11_bn().features),
        (lambda: SmallVGG(10, batch_norm=False).features, lambda: torchvision.models.vgg16().features),
        (lambda: SmallVGG(10).features, lambda: torchvision.models.vgg16_bn().features),
        (lambda: SmallMobileNetV2(10).features, lambda: torchvision.models.mobilenet_v2().features),
        (lambda: SmallConvNeXt(1000, patch_size=4), torchvision.models.convnext_tiny),
    ],
)
def test_the_published_width_is_the_published_network(own, reference):
    with torch.device("meta"):
        assert shapes(own()) == shapes(reference())


def test_published_numbers_of_parameters():
    with torch.device("meta"):
        base = SmallViT(1000, image_size=224, width=768, heads=12)
        assert count(base) == count(torchvision.models.vit_b_16()) == 86_567_656
        assert count(SmallViT(1000, image_size=224)) == 5_717_416  # DeiT-Ti
        assert abs(count(SmallConvNeXt(1000)) / 28_589_128 - 1) < 0.01  # ConvNeXt-T, whose patches have 4 pixels


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg_computes_what_torchvision_does(batch_norm):
    own = randomised(SmallVGG(5, depth=11, width=4, batch_norm=batch_norm))
    stages = [[4], [8], [16, 16], [32, 32], [32, 32]]
    reference = make_layers([x for stage in stages for x in [*stage, "M"]], batch_norm).eval()
    reference.load_state_dict(own.features.state_dict())
    images = torch.rand(2, 3, 64, 32)
    torch.testing.assert_close(own.features(images), reference(images))
    torch.testing.assert_close(own(images), own.classifier(reference(images).mean((2, 3))))


def test_mobilenet_computes_what_torchvision_does():
    own = randomised(SmallMobileNetV2(5, width=8))
    reference = torchvision.models.MobileNetV2(width_mult=0.25, round_nearest=1).eval()
    for first in (reference.features[0][0], reference.features[2].conv[1][0]):
        first.stride = (1, 1)
    # torchvision keeps the last convolution as wide as published.
    assert own.features[-1][0].out_channels == 320
    reference = reference.features[:-1]
    reference.load_state_dict(own.features[:-1].state_dict())
    images = torch.rand(2, 3, 28, 20)
    expected = reference(images)
    assert expected.shape == (2, 80, 4, 3)
    torch.testing.assert_close(own.features[:-1](images), expected)
    torch.testing.assert_close(own(images), own.classifier(own.features[-1](expected).mean((2, 3))))


def test_convnext_computes_what_torchvision_does():
    own = randomised(SmallConvNeXt(5, width=4, depth=1, patch_size=4))
    blocks = [CNBlockConfig(4, 8, 1), CNBlockConfig(8, 16, 1), CNBlockConfig(16, 32, 3), CNBlockConfig(32, None, 1)]
    reference = torchvision.models.ConvNeXt(blocks, num_classes=5).eval()
    reference.load_state_dict(own.state_dict())
    images = torch.rand(2, 3, 64, 32)
    torch.testing.assert_close(own(images), reference(images))
    # A side that is no multiple of 32 counts as if it were longer by zeros, and nothing is cut off.
    with torch.no_grad():
        cut = images[..., :33, :31].requires_grad_()
        patches = own.features[0][0]
        padded = nn.functional.pad(cut, (0, 1, 0, 3))
        assert torch.equal(patches(cut), nn.functional.conv2d(padded, patches.weight, patches.bias, stride=4))


def test_vit_computes_what_torchvision_does():
    own = randomised(SmallViT(5, image_size=32, width=16, depth=2))
    reference = torchvision.models.VisionTransformer(32, 4, 2, 2, 16, 64, num_classes=5).eval()
    names = {}
    for name in reference.state_dict():
        names[name] = name
        for theirs, ours in IN_TIMM.items():
            names[name] = names[name].replace(theirs, ours)
    state = own.state_dict()
    reference.load_state_dict({theirs: state.pop(ours) for theirs, ours in names.items()})
    assert not state
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(own(images), reference(images))


def test_vgg_without_batchnorm_keeps_the_scale_of_its_input():
    torch.manual_seed(0)
    images = torch.randn(4, 1, 32, 32)
    features = SmallVGG(5, width=16, in_channels=1, batch_norm=False).features(images)
    assert 0.2 < features.square().mean() < 5  # less than 0.01 with the fresh weights of torchvision


def test_vit_draws_queries_keys_and_values_by_their_own_size():
    torch.manual_seed(0)
    for part in SmallViT(5, width=64, depth=1).blocks[0].attn.qkv.weight.chunk(3):
        torch.testing.assert_close(part.abs().max().item(), math.sqrt(6 / (64 + 64)), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("size", "patch"), [(28, 4), (32, 4), (36, 4), (48, 4), (60, 5), (64, 8), (96, 8), (128, 16), (224, 16)]
)
def test_vit_chooses_patches(size, patch):
    with torch.device("meta"):
        assert SmallViT(5, image_size=size, width=8, depth=1).patch_embed.proj.kernel_size == (patch, patch)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PreActResNet18(10, width=0), "width: expected a whole number of at least 1, got 0"),
        (lambda: SmallVGG(10, width=2.5), r"width: expected a whole number of at least 1, got 2\.5; give"),
        (lambda: SmallVGG(10, depth=13), "depth: expected one of 11, 16, got 13; choose"),
        (lambda: SmallMobileNetV2(0), "num_classes: expected a whole number of at least 1, got 0"),
        (lambda: SmallConvNeXt(10, in_channels=True), "in_channels: expected a whole number of at least 1, got True"),
        (lambda: SmallConvNeXt(10, depth=-1), "depth: expected a whole number of at least 1, got -1"),
        (lambda: SmallViT(10, image_size=(28, 32)), r"image_size: expected a whole number of at least 1, got \(28, 32"),
        (lambda: SmallViT(10, image_size=31), "image_size: expected one that square patches .* got 31; scale"),
        (lambda: SmallViT(10, image_size=30, patch_size=4), "patch_size: expected a divisor of the image size, 30, go"),
        (lambda: SmallViT(10, width=200), "width: expected a multiple of the number of heads, 3, got 200; choose 201"),
        (lambda: SmallViT(10, heads=0), "heads: expected a whole number of at least 1, got 0"),
        (lambda: SmallViT(10, width=8, depth=1)(torch.zeros(1, 3, 32, 28)), "x: expected square .* 32x32.* got 32x28;"),
    ],
)
def test_wrong_sizes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
