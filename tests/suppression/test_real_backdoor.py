"""Training on poisoned digits, with a trigger that plain training learns: ASR above 95 % (`backdoored`)."""

import pytest
import torch

import bdfast
from bdfast.models import PreActResNet18
from bdfast.suppression import METHODS
from bdfast.suppression.suppressing import suppress

FEW = {"abl": {"isolation_epochs": 6, "epochs": 5}, "cbd": {"backdoor_epochs": 10, "epochs": 12}}
RATES = {"abl": 0.25, "cbd": 0.1}
"""The digits are learned as soon as a trigger in a tenth of them, so that ABL isolates digits then."""


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_a_real_backdoor_is_not_learned(digits, backdoored, method):
    _, judge, plain = backdoored
    poisoned = bdfast.poisoned(digits[0], bdfast.BadNets(size=2, poison_rate=RATES[method]))
    torch.manual_seed(0)
    model = PreActResNet18(10, width=8, in_channels=1).eval()
    before, generator = model.conv1.weight.clone(), torch.get_rng_state()
    options = {"method": method, "batch_size": 64, "amp": False, **FEW[method]}
    result = suppress(model, poisoned, truth=poisoned.poison_indices, **options)
    after = judge(result.model)
    assert after.asr < 0.1
    assert after.acc > plain.acc - 0.15
    assert result.precision == 1.0
    assert result.warnings == []
    assert torch.equal(model.conv1.weight, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not model.training
    assert not result.model.training
    assert all(parameter.grad is None for parameter in result.model.parameters())
