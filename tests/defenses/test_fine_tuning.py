"""The defenses that fine-tune, on a small network with a working backdoor."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import bdfast
from bdfast.defenses import METHODS
from bdfast.defenses.preflight import TRIED
from bdfast.defenses.stages import Staged
from bdfast.inversion import least_length, universal
from bdfast.training import Epoch, Probe

QUICK = {"batch_size": 64, "amp": False}
TRAINING = [name for name, cls in METHODS.items() if issubclass(cls, Staged)]
JUDGED = [name for name in METHODS if name != "ssft"]  # the network here has no skips


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ft_sam", {"rho": 1.0, "lr": 0.1, "epochs": 15}),
        ("sau", {"lr": 0.03, "epochs": 12, "bound": 0.4}),
        ("pam", {"rho": 0.1, "lr": 0.1, "epochs": 12, "triggered_share": 0.3, "invert_epochs": 10, "target": 0}),
    ],
)
def test_a_real_backdoor_is_removed(digits, backdoored, method, options):
    model, judge, before = backdoored
    kept = weights(model)
    result = bdfast.purify(model, digits[1], method=method, **options, **QUICK)
    after = judge(result.model, baseline=before)
    assert after.asr < 0.2
    assert after.acc > before.acc - 0.1
    assert torch.equal(weights(model), kept)
    assert result.method == method
    assert not result.neurons.any()
    assert result.scores.values.max() > 0
    assert {name: result.options[name] for name in options} == options
    assert result.found == ({"target": 0, "evidence": []} if method == "pam" else {})


@pytest.mark.parametrize("method", JUDGED)
def test_every_method_judges_itself(digits, trained, method, monkeypatch):
    """Leaves a verdict, a row for each stage, and says which strength it took, if any."""
    monkeypatch.setattr(least_length, "STEPS", 1)  # what the search finds is not looked at
    monkeypatch.setattr(universal, "JUDGED", 4)
    options = {
        "pam": {"invert_epochs": 1, "rounds": 1},
        "uau": {"rounds": 1},
        "i_bau": {"rounds": 1},
        "rnp": {"recover_updates": 2, "unlearn_lr": 0.05},
        "ims": {"first_rounds": 2, "rounds": 2},
        "otbr": {"unlearn_steps": 1, "unlearn_batch": 8},
        "clp": {},
    }
    given = options.get(method, {}) | ({"updates": 2} if method in (*TRAINING, "anp") else {})
    result = bdfast.purify(trained, digits[1].subset(torch.arange(192)), method=method, **given, **QUICK)
    probes = [row for row in result.history if isinstance(row, Probe)]
    strength = getattr(METHODS[method], "strength", "lr")
    assert {row.option for row in probes} == {strength}
    chosen = result.options[strength]
    assert [row.value for row in probes if row.chosen] == ([] if chosen is None else [chosen])
    assert result.verdict.held_out == 48
    assert len(result.found["least_lengths"]) == 10
    assert result.found["targets"] == list(result.verdict.targets)


@pytest.mark.parametrize("method", TRAINING)
@pytest.mark.parametrize("bn", ["at_theta", "official", "frozen", "recalibrate"])
def test_batchnorm_policies(digits, backdoored, method, bn):
    """Every policy moves the running statistics as often as it says, in one pass or several."""
    model, clean = backdoored[0], digits[1].subset(torch.arange(192))
    options = {
        "tsbd": {"n": 0.1, "unlearn_to": 0.9},
        "pam": {"rho": 0.1, "target": 0, "invert_epochs": 1, "rounds": 1},
        "uau": {"target": 0, "rounds": 1},
        "i_bau": {"rounds": 1},
    }
    result = bdfast.purify(model, clean, method=method, bn=bn, epochs=1, lr=1e-3, **options.get(method, {}), **QUICK)
    name = "layer1.0.bn1.num_batches_tracked"
    seen, start = int(result.model.state_dict()[name]), int(model.state_dict()[name])
    passes = 6 if method == "ulrl" else 3  # one more after each update
    assert seen == {"at_theta": start + 3, "official": start + passes, "frozen": start, "recalibrate": 3}[bn]
    moved = not torch.equal(
        result.model.state_dict()["layer1.0.bn1.running_mean"], model.state_dict()["layer1.0.bn1.running_mean"]
    )
    assert moved == (bn != "frozen")


def test_patience_ends_the_stage_and_sets_images_aside(digits, backdoored):
    clean = digits[1]
    result = bdfast.purify(backdoored[0], clean, method="ft", epochs=30, lr=1e-6, patience=2, **QUICK)
    rows = [row for row in result.history if isinstance(row, Epoch)]
    held_out = [row.held_out for row in rows]
    assert len(rows) < 30
    assert len(rows) - held_out.index(max(held_out)) == 3  # the best, and two epochs more
    share = len(clean) - round(0.9 * len(clean))
    assert all(value * share == pytest.approx(round(value * share)) for value in held_out)


@pytest.mark.parametrize("method", ["ft", "sam"])
def test_baselines_train_on_the_labels_alone(method, digits, backdoored):
    teacher = copy.deepcopy(backdoored[0])
    asked = []
    teacher.register_forward_hook(lambda module, *_: asked.append(module))
    result = bdfast.purify(teacher, digits[1], method=method, epochs=1, lr=0.01, inplace=True, **QUICK)
    others = [module for module in asked if module is not result.model]
    assert len(others) == TRIED  # the passes before the first update, on a copy; no teacher


def test_a_defense_of_ones_own_goes_by_the_name_of_its_class(digits, backdoored):
    class Mine(bdfast.FTSAMDefense):
        pass

    result = bdfast.purify(backdoored[0], digits[1], method=Mine(rho=0.5, lr=0.01, epochs=1), **QUICK)
    assert result.method == "Mine"


def test_a_network_without_batchnorm_or_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.rand(60, 1, 4, 4)
    data = TensorDataset(x, (x[:, 0, 0, 0] > 0.5).long())
    for method, options in (
        ("ft_sam", {"rho": 1.0}),
        ("pam", {"rho": 0.1, "invert_epochs": 1}),
        ("sau", {}),
        ("i_bau", {}),
    ):
        result = bdfast.purify(model, data, method=method, epochs=1, lr=0.01, amp=False, **options)
        assert weights(result.model).isfinite().all()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ft_sam", {"rho": -1.0}, "rho: expected at least 0, got -1.0"),
        ("pam", {"rho": -1.0}, "rho: expected at least 0, got -1.0"),
        ("pam", {"triggered_share": 2.0}, r"triggered_share: expected a share in \[0, 1\], got 2.0"),
        ("pam", {"rounds": 0}, "rounds: expected at least 1, got 0"),
        ("ft", {"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ("ft", {"patience": 0}, "patience: expected at least 1, got 0"),
        ("ft", {"label_smoothing": 1.5}, r"label_smoothing: expected a share in \[0, 0.9\], got 1.5"),
    ],
)
def test_wrong_options_are_explained(method, options, message, digits, backdoored):
    with pytest.raises(ValueError, match=message):
        bdfast.purify(backdoored[0], digits[1], method=method, **options)


@pytest.mark.parametrize("method", ["pam", "sau", "i_bau", "uau"])
def test_images_are_needed(method, backdoored, digits):
    rows = [{"pixels": image, "digit": label} for image, label in digits[1]][:64]
    with pytest.raises(ValueError, match=r"clean: expected batches of \(images \[B, C, H, W\], labels\), got dict"):
        bdfast.purify(
            backdoored[0], rows, method=method, lr=0.01, forward=lambda m, batch: (m(batch["pixels"]), batch["digit"])
        )
