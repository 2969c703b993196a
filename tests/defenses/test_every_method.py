"""What holds for every method, on every kind of network: it works, or it refuses before any work."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import bdfast
from bdfast.defenses import METHODS
from bdfast.defenses.base import DataFree
from bdfast.defenses.pruning import Pruning
from bdfast.inversion import least_length, universal
from bdfast.models import ModelSpec
from bdfast.training.batchnorm import recalibrate
from bdfast.training.copies import copy_of

NETWORKS = {
    "resnet": {"arch": "preact_resnet18", "width": 4},
    "no BatchNorm": {"arch": "small_vgg11", "width": 4},
    "depthwise": {"arch": "small_mobilenet_v2", "width": 8},
    "attention": {"arch": "small_vit", "width": 16, "depth": 1},
}

# One stage, and as short as it gets.
SHORT = {
    "uau": {"lr": 1e-3, "rounds": 1, "epochs": 1},
    "pam": {"lr": 1e-3, "rounds": 1, "epochs": 1, "invert_epochs": 1, "target": 0},
    "ft_sam": {"lr": 1e-3, "epochs": 1},
    "tsbd": {"lr": 1e-3, "epochs": 1, "n": 0.1, "unlearn_to": 0.9, "unlearn_lr": 0.05},
    "sau": {"lr": 1e-3, "epochs": 1, "steps": 1},
    "i_bau": {"lr": 1e-3, "epochs": 1, "rounds": 1, "iterations": 1},
    "ft": {"lr": 1e-3, "epochs": 1},
    "sam": {"lr": 1e-3, "epochs": 1},
    "ulrl": {"lr": 1e-3, "epochs": 1, "unlearn_to": 0.9, "unlearn_lr": 0.05},
    "rnp": {"threshold": 0.5, "recover_updates": 1, "unlearn_to": 0.9, "unlearn_lr": 0.05},
    "otbr": {"gamma": 0.1, "unlearn_steps": 1, "unlearn_batch": 8},
    "ssft": {"lr": 1e-3, "epochs": 1, "unlearn_to": 0.9, "unlearn_lr": 0.05},
    "anp": {"threshold": 0.5, "updates": 1},
    "clp": {"u": 2.0},
    "fine_pruning": {"lr": 1e-3, "epochs": 1},
    "nad": {"lr": 1e-3, "epochs": 1},
    "fst": {"lr": 1e-3, "epochs": 1},
    "d3": {"lr": 1e-3, "epochs": 1},
    "ims": {"threshold": 1.0, "first_rounds": 1, "rounds": 1, "steps": 1},
}

REFUSED = {
    ("ssft", "no BatchNorm"): "model: expected a residual network",
}


def images(count: int = 15) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    noise = 0.3 * torch.rand(count, 3, 32, 32, generator=generator)
    return TensorDataset(noise + 0.35 * labels.view(-1, 1, 1, 1) - 0.5, labels)


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request):
    """A network that has learnt a few images, so that there is something to unlearn; some parts in other modes."""
    torch.manual_seed(0)
    model = ModelSpec(num_classes=3, **NETWORKS[request.param]).build()
    x, y = images().tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    recalibrate(model, [x], lambda network, batch: network(batch))
    model.eval()
    assert (model(x).argmax(1) == y).all()
    next(iter(model.children())).train()
    list(model.parameters())[-1].requires_grad_(False)
    return request.param, model


def modes(model: nn.Module) -> list[tuple]:
    return [(name, module.training) for name, module in model.named_modules()] + [
        (name, parameter.requires_grad) for name, parameter in model.named_parameters()
    ]


@pytest.mark.parametrize("method", list(METHODS))
def test_it_works_or_refuses_before_any_work(method, network, monkeypatch):
    kind, model = network
    monkeypatch.setattr(least_length, "STEPS", 1)
    monkeypatch.setattr(universal, "JUDGED", 4)
    before, shape = copy_of(model), modes(model)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    options = {"amp": False, "augment": None, "batch_size": 8, **SHORT[method]}
    if (method, kind) in REFUSED:
        monkeypatch.setattr(torch.optim.Optimizer, "__init__", lambda *_: pytest.fail("work had begun"))
        with pytest.raises(ValueError, match=REFUSED[method, kind]):
            bdfast.purify(model, images(), method=method, **options)
        return
    result = bdfast.purify(model, images(), method=method, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes(model) == modes(result.model) == shape
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.state_dict().items())
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert all(x.isfinite().all() for x in result.model.state_dict().values())
    assert all(parameter.grad is None for parameter in result.model.parameters())
    logits = result.model(images().tensors[0])
    assert logits.isfinite().all()
    # What is frozen has no gradient to go by; pruning may set it to zero.
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for name in frozen:
        after = result.model.get_parameter(name)
        assert ((after == before.get_parameter(name)) | ((after == 0) & issubclass(METHODS[method], Pruning))).all()
    if method in ("rnp", "anp", "clp"):
        # Every weight is as it was or zero.
        for name, parameter in result.model.named_parameters():
            assert ((parameter == before.get_parameter(name)) | (parameter == 0)).all(), name
    else:
        assert any(not torch.equal(x, before.get_parameter(name)) for name, x in result.model.named_parameters())


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if issubclass(cls, DataFree)])
def test_those_that_can_do_without_images(method, network):
    _, model = network
    before, shape = copy_of(model), modes(model)
    options = {**SHORT[method], **({"image_shape": (3, 32, 32)} if method == "otbr" else {})}
    result = bdfast.purify(model, None, method=method, **options)
    assert modes(model) == modes(result.model) == shape
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.state_dict().items())
    assert result.model(images().tensors[0]).isfinite().all()
    assert result.verdict is None
    assert result.warnings == []


def test_every_method_has_a_short_form_here():
    assert set(SHORT) == set(METHODS)
