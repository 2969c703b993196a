"""Nothing is decided without evidence, and frozen parameters stay."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bdfast
from bdfast.training import fit
from bdfast.training.batchnorm import batchnorms, kept_statistics, recalibrate
from bdfast.training.copies import copy_of

QUICK = {"amp": False, "augment": None, "epochs": 1, "lr": 0.01}


def test_a_model_at_chance_is_told_and_tsbd_refuses_it(trained, clean):
    wrong = TensorDataset(clean.images.float() / 255, (clean.labels + 1) % 10)
    for method in ("ft", "ft_sam"):
        with pytest.warns(
            UserWarning, match="clean: expected a model that is better than chance on it, got an accuracy"
        ):
            result = bdfast.purify(
                trained, wrong, method=method, **({"rho": 0.1} if method == "ft_sam" else {}), **QUICK
            )
        assert "better than chance" in result.warnings[0]
    passes = []
    with (
        pytest.warns(UserWarning, match="better than chance"),
        pytest.raises(ValueError, match="clean: expected images on which the model is better than a constant answer"),
    ):
        bdfast.purify(
            trained, wrong, method="tsbd", n=0.2, forward=lambda m, b: (passes.append(1) or m(b[0]), b[1]), **QUICK
        )
    assert len(passes) < 20


def test_classes_without_an_image_are_told(trained, clean):
    with pytest.warns(
        UserWarning, match="clean: expected at least one sample per class, got none of 5 of the 10; add some"
    ):
        bdfast.purify(trained, clean.subset(torch.arange(8)), method="ft", **QUICK)


def frozen(model: nn.Module, *but: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(but) if but else False)
    return model


def test_frozen_parameters_are_never_written_to(trained, digits):
    model = frozen(copy_of(trained), "4")
    with pytest.raises(ValueError, match="model: expected neurons that can be trained, got 8 in 1 parameters"):
        bdfast.purify(model, digits[1], method="tsbd", n=0.2, **QUICK)
    before = {name: value.clone() for name, value in model.named_parameters()}
    options = {"tsbd": {"n": 0.2, "layers": "linear", "unlearn_lr": 0.01}, "ft_sam": {"rho": 0.5}, "pam": {"rho": 0.1}}
    for method in ("tsbd", "ft_sam", "pam", "ft", "sam"):
        result = bdfast.purify(model, digits[1], method=method, **options.get(method, {}), **QUICK)
        changed = {n for n, value in result.model.named_parameters() if not torch.equal(value, before[n])}
        assert changed
        assert all(name.startswith("4") for name in changed), method


def test_what_has_not_changed_is_not_zeroed(trained):
    scores = bdfast.neuron_weight_change(trained, trained)
    model = copy_of(trained)
    assert bdfast.reinitialize(model, scores, n=0.2, m=0.7, changed=(trained, trained)).zeroed == 0
    moved = copy_of(trained)
    with torch.no_grad():
        moved[4].weight[:, :3] += 0.1  # fewer sub-weights than are to be zeroed
    scores = bdfast.neuron_weight_change(moved, trained)
    done = bdfast.reinitialize(model, scores, n=0.5, m=0.9, changed=(moved, trained))
    assert done.zeroed == 3 * int(done.neurons.sum()) == 27
    assert int((model[4].weight == 0).sum()) == 27


def test_the_history_says_what_the_inputs_are(trained, clean):
    scaled = TensorDataset(clean.images.float(), clean.labels)
    (note,) = bdfast.purify(trained, scaled, method="ft", **QUICK).history[0].notes
    assert note.startswith("The images are not in [0, 1] but in [0, 255]")
    rows = [{"x": image, "y": label} for image, label in clean]
    result = bdfast.purify(trained, rows, method="ft", forward=lambda m, b: (m(b["x"]), b["y"]), **QUICK)
    assert result.history[0].notes == ("The inputs are no images [B, C, H, W]: neither shifted nor overlaid.",)
    assert bdfast.purify(trained, clean, method="ft", **QUICK).history[0].notes == ()


def test_instance_norm_obeys_the_policy(clean):
    torch.manual_seed(0)
    model = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), nn.Flatten(), nn.Linear(64, 10))
    assert len(batchnorms(model)) == 1
    batches = [x for x, _ in DataLoader(clean, batch_size=48)]
    model.train()
    with kept_statistics(model):
        model(batches[0])
    assert float(model[0].running_mean) == 0
    recalibrate(model, batches, lambda m, x: m(x))
    expected = torch.stack([x.mean((2, 3)).mean() for x in batches]).mean()
    torch.testing.assert_close(model[0].running_mean[0], expected)
    assert model[0].momentum == 0.1
    before = model[0].running_mean.clone()
    result = bdfast.purify(model, clean, method="ft", bn="frozen", **QUICK)
    assert torch.equal(result.model[0].running_mean, before)


def test_a_network_that_was_damaged_is_told(trained, clean):
    with pytest.warns(UserWarning, match=r"model: expected to keep its accuracy on clean \(9\d.\d%\), got "):
        result = bdfast.purify(trained, clean, method="ft", **{**QUICK, "lr": 30.0})
    (warning,) = result.warnings
    assert "the network is damaged" in warning
    assert bdfast.purify(trained, clean, method="ft", **{**QUICK, "lr": 1e-4}).warnings == []


def test_tsbd_ranks_what_is_not_frozen_alone(digits):
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(96, 10))
    fit(model, digits[0], epochs=3, lr=0.05, amp=False)
    first.requires_grad_(False)
    result = bdfast.purify(model, digits[1], method="tsbd", n=0.3, unlearn_lr=0.01, **QUICK)
    assert len(result.scores) == len(result.neurons) == 6
    assert result.neurons_reset == 1
    assert torch.equal(result.model[0].weight, first.weight)
