"""Networks with skips, and passes through them that are written out by hand."""

import torch
from torch import nn
from torch.nn import functional as F

from bdfast.defenses.parts.skips import Skip, find_skips
from bdfast.training.seeds import seeded


def images(size: int = 16, channels: int = 3, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, size, size, dtype=torch.float64, generator=generator)


def built(make) -> nn.Module:
    """In float64, with statistics and scales that are not those of a fresh network."""
    with seeded(0, torch.device("cpu")):
        model = make().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for x in (module.weight.data, module.running_var):
                    x.uniform_(0.5, 1.5)
                for x in (module.bias.data, module.running_mean):
                    x.normal_(0, 0.3)
    return model.eval()


def skips_of(model: nn.Module, x: torch.Tensor) -> list[Skip]:
    return find_skips(model, lambda: model(x))


def of_preact(model, x, number, gamma):
    """PreActResNet18 by hand."""
    x = model.conv1(x)
    for i in range(8):
        block = model.get_submodule(f"layer{i // 2 + 1}")[i % 2]
        out = F.relu(block.bn1(x))
        skip = x if block.shortcut is None else block.shortcut(out)
        x = block.conv2(F.relu(block.bn2(block.conv1(out)))) + (gamma if i == number else 1) * skip
    return model.linear(x.mean((2, 3)))


def of_torchvision(model, x, number, gamma):
    """resnet18 of torchvision by hand; it writes its sums into the branch."""
    x = model.maxpool(F.relu(model.bn1(model.conv1(x))))
    for i in range(8):
        block = model.get_submodule(f"layer{i // 2 + 1}")[i % 2]
        out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        skip = x if block.downsample is None else block.downsample(x)
        x = F.relu(out + (gamma if i == number else 1) * skip)
    return model.fc(x.mean((2, 3)))


def of_vit(model, x, number, gamma):
    """SmallViT by hand."""
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), model.patch_embed(x)], 1) + model.pos_embed
    for i, block in enumerate(model.blocks):
        x = block.attn(block.norm1(x)) + (gamma if 2 * i == number else 1) * x
        x = block.mlp(block.norm2(x)) + (gamma if 2 * i + 1 == number else 1) * x
    return model.head(model.norm(x)[:, 0])


class Of(nn.Module):
    """A network of one function of (its layers, input, ...)."""

    def __init__(self, function, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function
        self.parameter = nn.Parameter(torch.rand(2, 3, 16, 16))

    def forward(self, *inputs):
        return self.function(self, *inputs)


def convolutions(count: int) -> list[nn.Module]:
    return [nn.Conv2d(3, 3, 3, padding=1) for _ in range(count)]


def branch(model: nn.Module, x: torch.Tensor, *places: int) -> torch.Tensor:
    for place in places:
        x = torch.tanh(model.layers[place](x))
    return x
