"""What the tests of ULRL and RNP share: images, networks in float64 that have learnt them, and the published run."""

from dataclasses import fields

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast.defenses.base import Defense


def images(classes: int, shape: tuple[int, ...] = (1, 4, 4)) -> TensorDataset:
    """Sixty; how bright they are tells the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % classes
    pixels = torch.rand(60, *shape, dtype=torch.float64, generator=generator)
    return TensorDataset(pixels + 0.3 * labels.view(-1, *[1] * len(shape)), labels)


def trained(model: nn.Module, data: TensorDataset) -> nn.Module:
    """In float64, until there is something to unlearn."""
    optimizer = torch.optim.Adam(model.double().train().parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


def purified(
    model: nn.Module, data: TensorDataset, cls: type[Defense], batch_size: int, **changes
) -> bdfast.PurifyResult:
    """The published run, on images as they are."""
    settings = {**cls.PUBLISHED, "batch_size": batch_size, "augment": None, **changes}
    options = {field.name: settings.pop(field.name) for field in fields(cls) if field.name in settings}
    return bdfast.purify(model, data, method=cls(**options), **settings)
