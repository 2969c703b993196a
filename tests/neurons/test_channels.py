"""Channels: which ones a network has, scaled ones, and pruned ones."""

import pytest
import torch
from torch import nn

from bdfast.models import ModelSpec
from bdfast.neurons.channels import channel_index, scale_channels, scaled, scaled_biases
from bdfast.training.replaced import replaced


def build(arch: str) -> nn.Module:
    torch.manual_seed(0)
    return ModelSpec(arch=arch, width=16, num_classes=5).build().double().eval()


@pytest.mark.parametrize("arch", ["preact_resnet18", "small_mobilenet_v2", "small_vit", "small_convnext"])
def test_the_scales_of_normalisation_layers_are_channels(arch):
    model = build(arch)
    scales = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    index = channel_index(model, None)
    assert len(index) == sum(module.weight.numel() for module in scales)


def test_without_scales_output_units_are_channels_but_not_the_logits():
    model = build("small_vgg11")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = channel_index(model, linear[-1])
    assert len(channel_index(model, None)) == len(kept) + 5
    assert all(layer.module != linear[-1] for layer in kept.layers)


class ByHand(nn.Module):
    """Two layers of each kind, with factors written out."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.norm = nn.GroupNorm(2, 4) if norm else nn.Identity()
        self.last = nn.Linear(4 * 25, 3)

    def forward(self, x, factors=None):
        convolutions = torch.ones(10, dtype=x.dtype) if factors is None or factors.numel() == 4 else factors
        x = self.first(x) - self._bias(self.first, 6)
        x = x * convolutions[:6].view(-1, 1, 1) + self._bias(self.first, 6)
        x = self.up(x) - self._bias(self.up, 4)
        x = x * convolutions[6:].view(-1, 1, 1) + self._bias(self.up, 4)
        if factors is not None and factors.numel() == 4:
            shift = self.norm.bias.view(-1, 1, 1)
            x = (self.norm(x) - shift) * factors.view(-1, 1, 1) + shift
        else:
            x = self.norm(x)
        return self.last(x.flatten(1))

    def _bias(self, layer, count):
        return layer.bias.view(count, 1, 1)


@pytest.mark.parametrize("norm", [True, False])
def test_scaled_channels_are_outputs_times_factors(norm):
    torch.manual_seed(0)
    model = ByHand(norm).double()
    if norm:
        nn.init.normal_(model.norm.weight)
        nn.init.normal_(model.norm.bias)
    index = channel_index(model, "last")
    factors = torch.rand(len(index), dtype=torch.float64, requires_grad=True)
    images = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    with replaced(model, scaled(model, index, factors)):
        got = model(images)
    expected = model(images, factors)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(x.square().sum(), factors)[0] for x in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert [type(x) for x in model.parameters()] == [nn.Parameter] * len(list(model.parameters()))
    # The same with zeros, in place.
    mask = torch.arange(len(index)) % 3 == 0
    expected = model(images, (~mask).double())
    before = {name: x.clone() for name, x in model.named_parameters()}
    scale_channels(model, index, ~mask)
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters() if name.endswith("bias"))
    scale_channels(model, index, ~mask, biases=True)
    biases = torch.cat(
        [x for name, x in model.named_parameters() if name in {f"{y.module}.bias" for y in index.layers}]
    )
    assert torch.equal(biases == 0, mask)


def test_biases_are_scaled_where_there_are_any():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).double()
    model[3].register_parameter("bias", None)
    nn.init.normal_(model[1].bias)
    factors = torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    changed = scaled_biases(model, channel_index(model, None), factors)
    assert list(changed) == ["1.bias"]
    torch.testing.assert_close(changed["1.bias"], model[1].bias * torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64))
