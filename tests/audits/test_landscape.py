import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import bdfast
from bdfast.audits.landscape import loss_along_gradient, metrics_along_path, survey
from bdfast.defenses.purification import purify
from bdfast.training import Setup


class Linear(nn.Module):
    """Logits (w x, 0): the gradient of the loss is known."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x * self.weight, torch.zeros_like(x)], 1)


def test_loss_along_the_gradient():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    data = TensorDataset(x, torch.zeros(2, dtype=torch.long))
    model = Linear(0.5).train()
    model.weight.grad = torch.ones(1, dtype=torch.float64)
    losses = loss_along_gradient(model, data, [0.0, 0.2], batch_size=1)
    # It falls with w, so the gradient leads to smaller w.
    expected = [torch.nn.functional.softplus(-x * w).mean().item() for w in (0.5, 0.3)]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 0.5
    assert model.weight.grad.item() == 1
    assert model.training


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_the_path_has_both_networks_at_its_ends():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    data = TensorDataset(x, (x[:, 0] > 0).long())
    before, after = network(0), network(1)
    kept = copy.deepcopy(after.state_dict())
    judge = bdfast.Evaluator(data)
    path = metrics_along_path(before, after, judge, recalibrate_on=data, points=3)
    assert [t for t, _ in path] == [0, 0.5, 1]
    for (_, metrics), model in zip(path[::2], (before, after), strict=True):
        assert metrics.acc == bdfast.evaluate(model, data, recalibrate_on=data).acc
    assert all(torch.equal(value, kept[name]) for name, value in after.state_dict().items())
    found = survey(before, after, judge, data, note="", points=3)
    assert len(found.radii) == len(found.losses[0]) == len(found.losses[1]) == len(found.path) == 3


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wanted", [True, False])
def test_memory_format_is_restored_and_told_in_the_history(given, wanted):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model = model.to(memory_format=given)
    data = TensorDataset(torch.rand(20, 3, 4, 4), torch.arange(20) % 2)
    seen = []
    model[0].register_forward_hook(lambda module, *_: seen.append(module.weight.stride()))
    result = purify(model, data, method="ft", epochs=1, lr=0.01, batch_size=8, channels_last=wanted, amp=False)
    assert isinstance(result.history[0], Setup)
    assert result.history[0].channels_last is wanted
    assert result.model[0].weight.stride() == model[0].weight.stride()
    assert ((27, 1, 9, 3) in seen) == (wanted or given is torch.channels_last)
