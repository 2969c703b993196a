"""The layer whose outputs are the logits is found by a pass, whatever it is called."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from bdfast.data.batches import Batches
from bdfast.defenses.parts.classifier import classifier_of
from bdfast.models import ModelSpec, normalized
from bdfast.training import Run


def batches(channels: int = 3, size: int = 32) -> Batches:
    return Batches(TensorDataset(torch.rand(4, channels, size, size), torch.arange(4)), device="cpu")


@pytest.mark.parametrize("arch", ["preact_resnet18", "small_vgg11", "small_mobilenet_v2", "small_vit", "resnet18"])
def test_of_every_kind_of_network(arch):
    model = ModelSpec(arch=arch, width=None if arch == "resnet18" else 16, num_classes=5).build().train()
    found = classifier_of(model, batches(), Run())
    assert isinstance(model.get_submodule(found), nn.Linear)
    assert model.get_submodule(found).out_features == 5
    assert model.training
    assert classifier_of(normalized(model, mean=(0.5,) * 3, std=(0.5,) * 3), batches(), Run()).endswith(found)


class Odd(nn.Module):
    """Its last linear layer by order is not the one of the logits."""

    def __init__(self, scale: float = 1.0, twice: bool = False) -> None:
        super().__init__()
        self.head, self.scale, self.twice = nn.Linear(48, 7), scale, twice
        self.before = nn.Linear(48, 48)

    def forward(self, x):
        x = self.before(x.flatten(1)[:, :48])
        if self.twice:
            self.head(x)
        return self.head(x) * self.scale


def test_a_layer_of_another_place_and_logits_of_another_kind():
    assert classifier_of(Odd(), batches(), Run()) == "head"
    for model in (Odd(scale=2.0), Odd(twice=True), nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten())):
        with pytest.raises(ValueError, match="model: expected a linear layer whose outputs are the logits, got none"):
            classifier_of(model, batches(), Run())
    with pytest.raises(ValueError, match="none among the 2 linear layers of a Odd"):
        classifier_of(Odd(scale=2.0), batches(), Run())
