import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bdfast
from bdfast.defenses import fine_tuning
from bdfast.models import PreActResNet18
from bdfast.optim import GradientNorm
from bdfast.training import Probe

QUICK = {"method": "tsbd", "batch_size": 64, "amp": False, "unlearn_lr": 1e-3, "epochs": 12, "lr": 0.03}


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])


def test_a_real_backdoor_is_removed(digits, backdoored):
    model, judge, before = backdoored
    weights_before, generator_before = weights(model), torch.get_rng_state()
    result = bdfast.purify(model, digits[1], n=0.3, **QUICK)
    after = judge(result.model, baseline=before)
    assert after.asr < 0.1
    assert after.acc > before.acc - 0.1
    assert after.der > 0.9
    # Nothing but the result has changed.
    assert torch.equal(weights(model), weights_before)
    assert torch.equal(torch.get_rng_state(), generator_before)
    assert not model.training
    assert not result.model.training
    assert all(parameter.grad is None for parameter in result.model.parameters())
    assert int(result.neurons.sum()) == int(0.3 * len(result.scores))
    stages = [getattr(row, "stage", "") for row in result.history]
    assert stages.count("fine-tune") == 12
    assert stages.count("unlearn") in range(2, 50)
    assert result.options["n"] == 0.3


def test_same_seed_same_bits_and_a_loader_is_as_good_as_a_data_set(digits, backdoored):
    model, clean = backdoored[0], digits[1]
    options = {**QUICK, "n": 0.3, "epochs": 1}
    first = bdfast.purify(model, clean, **options)
    again = bdfast.purify(model, clean, **options)
    loader = bdfast.purify(model, DataLoader(clean, batch_size=64, shuffle=True), **options)
    other = bdfast.purify(model, clean, seed=1, **options)
    assert torch.equal(weights(first.model), weights(again.model))
    assert torch.equal(weights(first.model), weights(loader.model))
    assert not torch.equal(weights(first.model), weights(other.model))


def test_a_killed_purification_resumes_to_the_same_bits(tmp_path, digits, trained, monkeypatch):
    model, clean = trained, digits[1].subset(torch.arange(128))
    options = {**QUICK, "lr": None, "epochs": 2, "augment": bdfast.Augmentation(shift=1)}
    undisturbed = bdfast.purify(model, clean, **options)
    steps = 0
    original = GradientNorm.first_step

    def dying(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps in (3, 8):  # inside the first stage, and later on
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(GradientNorm, "first_step", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            bdfast.purify(model, clean, workdir=tmp_path, **options)
    resumed = bdfast.purify(model, clean, workdir=tmp_path, **options)
    assert torch.equal(weights(undisturbed.model), weights(resumed.model))
    assert undisturbed.options == resumed.options
    with pytest.raises(ValueError, match="workdir: expected checkpoints of this run"):
        bdfast.purify(model, clean, workdir=tmp_path, **{**options, "epochs": 3})


def test_the_rate_is_chosen_from_clean_data(digits, trained):
    clean = digits[1].subset(torch.arange(192))
    result = bdfast.purify(trained, clean, max_accuracy_drop=0.1, **{**QUICK, "lr": None, "epochs": 2})
    probes = [row for row in result.history if isinstance(row, Probe)]
    assert {row.option for row in probes} == {"lr"}
    assert [row.value for row in probes] == list(bdfast.TSBDDefense.rates[: len(probes)])
    assert [row.value for row in probes if row.chosen] == [result.options["lr"]]
    assert all(row.kept == (row.accuracy >= row.floor) for row in probes)
    assert result.verdict.held_out == 48


def test_inplace_purifies_the_model_itself_and_undoes_a_failure(digits, backdoored, monkeypatch):
    model, clean = copy.deepcopy(backdoored[0]), digits[1]
    before = weights(model)
    monkeypatch.setattr(fine_tuning, "recalibrate", lambda *args: (_ for _ in ()).throw(RuntimeError("halt")))
    with pytest.raises(RuntimeError, match="halt"):
        bdfast.purify(model, clean, inplace=True, n=0.3, bn="recalibrate", **{**QUICK, "epochs": 1})
    assert torch.equal(weights(model), before)
    result = bdfast.purify(model, clean, inplace=True, n=0.3, **{**QUICK, "epochs": 1})
    assert result.model is model
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize("bn", ["at_theta", "official", "frozen", "recalibrate"])
def test_batchnorm_policies(digits, backdoored, bn, monkeypatch):
    """Every policy moves the running statistics as often as it says."""
    model, clean = backdoored[0], digits[1]
    result = bdfast.purify(model, clean, n=0.3, bn=bn, **{**QUICK, "epochs": 1, "lr": 1e-3})
    steps = -(-len(clean) // 64)
    seen = int(result.model.state_dict()["layer1.0.bn1.num_batches_tracked"])
    start = int(model.state_dict()["layer1.0.bn1.num_batches_tracked"])
    assert seen == {"at_theta": start + steps, "official": start + steps, "frozen": start, "recalibrate": steps}[bn]


def test_vanished_gradients_do_not_poison_the_weights(digits, backdoored):
    """Zeroing nearly everything makes whole gradients zero; the published code then divides by zero."""
    result = bdfast.purify(backdoored[0], digits[1], n=1.0, m=1.0, **{**QUICK, "epochs": 1, "scope": "tensor"})
    assert weights(result.model).isfinite().all()


def test_other_batches_through_forward(digits, backdoored):
    model, clean = backdoored[0], digits[1]
    rows = [{"pixels": image, "digit": label} for image, label in clean]
    options = {**QUICK, "n": 0.3, "epochs": 1, "overlay": 0.0}
    result = bdfast.purify(model, rows, forward=lambda m, batch: (m(batch["pixels"]), batch["digit"]), **options)
    plain = bdfast.purify(model, clean, augment=None, **options)
    assert torch.equal(weights(result.model), weights(plain.model))


def test_the_published_settings(digits, backdoored):
    settings = {**bdfast.TSBDDefense.PUBLISHED, "unlearn_lr": 1e-3, "unlearn_epochs": 6, "batch_size": 64, "epochs": 1}
    result = bdfast.purify(backdoored[0], digits[1], method="tsbd", n=0.2, **settings)
    stages = [getattr(row, "stage", "") for row in result.history]
    assert stages.count("fine-tune") == 1
    assert result.history[stages.index("fine-tune") - 1].accuracy < 0.6  # it went on towards chance


def test_a_network_without_batchnorm_or_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(60, 4)
    result = bdfast.purify(
        model,
        TensorDataset(x, (x[:, 0] > 0).long()),
        method="tsbd",
        n=0.5,
        epochs=1,
        lr=0.03,
        unlearn_lr=0.05,
        amp=False,
    )
    assert len(result.scores) == 18


def test_purified_results_are_saved_whole(tmp_path, digits, backdoored):
    result = bdfast.purify(backdoored[0], digits[1], n=0.3, **{**QUICK, "epochs": 1})
    result.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.safetensors",
        "result.json",
        "scores.csv",
    ]
    copied = bdfast.io.load_into(PreActResNet18(10, width=8, in_channels=1), tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights(copied), weights(result.model))
