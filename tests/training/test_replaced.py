"""Other tensors in the place of parameters."""

import pytest
import torch
from torch import nn

from bdfast.training.replaced import replaced


def test_tied_parameters_follow_and_everything_is_put_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    names, parameters = list(model.state_dict()), list(model.parameters())
    factor = torch.tensor(2.0, requires_grad=True)
    images = torch.randn(2, 3)

    def within():
        with replaced(model, {"0.weight": model[0].weight.detach() * factor}):
            assert model[1].weight is model[0].weight
            model(images).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        within()
    assert factor.grad != 0
    assert model[0].weight.grad is None
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert model[1].weight is model[0].weight
