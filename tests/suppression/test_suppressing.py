"""The entry point: a real backdoor, what it leaves alone, resumption, and errors."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import bdfast
from bdfast.suppression import METHODS, ABLSuppression, abl, sgd_training
from bdfast.suppression.suppressing import suppress
from bdfast.training import Epoch, Setup

# A few updates on a few samples, where only the mechanics count.
pytestmark = pytest.mark.filterwarnings("ignore:unlearn_lr. expected:UserWarning")

SHORT = {
    "abl": {"isolation_epochs": 2, "epochs": 2, "unlearn_epochs": 2, "recover_epochs": 1, "ratio": 0.05},
    "cbd": {"backdoor_epochs": 2, "epochs": 2, "dependence": 0.1},
}
QUICK = {"batch_size": 32, "amp": False}


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])


@pytest.mark.parametrize("method", list(METHODS))
def test_same_seed_same_bits(network, suspicious, method):
    options = {**QUICK, **SHORT[method], "method": method, "augment": bdfast.Augmentation(shift=1)}
    first, again = (suppress(network, suspicious, **options) for _ in range(2))
    loader = suppress(network, DataLoader(suspicious, batch_size=32, shuffle=True), **options)
    told = suppress(network, suspicious, truth=range(10), **options)
    other = suppress(network, suspicious, seed=1, **options)
    assert torch.equal(weights(first.model), weights(again.model))
    assert torch.equal(weights(first.model), weights(loader.model))
    assert torch.equal(weights(first.model), weights(told.model))
    assert torch.equal(first.suspected, told.suspected)
    assert not torch.equal(weights(first.model), weights(other.model))
    assert isinstance(first.history[0], Setup)
    assert first.updates == sum(row.updates for row in first.history if isinstance(row, Epoch))


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", list(METHODS))
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, network, suspicious, method, monkeypatch):
    """Killed in the first epoch, and then once in every later one, until it comes through."""
    options = {**QUICK, **SHORT[method], "method": method, "augment": bdfast.Augmentation(shift=1)}
    undisturbed = suppress(network, suspicious, **options)
    original, steps, kills = sgd_training.check_finite_gradients, 0, 0

    def dying(*args):
        nonlocal steps
        steps += 1
        # Two updates: the two epochs of the ascent. Nine: after an epoch of seven, within the next one.
        if steps == (2 if len(list(tmp_path.iterdir())) > 3 else 9):
            raise Killed
        return original(*args)

    monkeypatch.setattr(sgd_training, "check_finite_gradients", dying)
    while True:
        steps = 0
        try:
            resumed = suppress(network, suspicious, workdir=tmp_path, **options)
            break
        except Killed:
            kills += 1
    assert kills >= 3
    assert torch.equal(weights(undisturbed.model), weights(resumed.model))
    assert torch.equal(undisturbed.suspected, resumed.suspected)
    assert undisturbed.options == resumed.options
    assert undisturbed.updates == resumed.updates
    rows = [[replace(x, seconds=0.0) for x in r.history if isinstance(x, Epoch)] for r in (undisturbed, resumed)]
    assert rows[0] == rows[1]
    with pytest.raises(ValueError, match="workdir: expected checkpoints of this run"):
        suppress(network, suspicious, workdir=tmp_path, **{**options, "lr": 0.05})


def test_the_precision_counts_the_suspects_that_are_poisoned(network, suspicious):
    options = {**QUICK, **SHORT["abl"]}
    marks = torch.arange(200) < 10
    results = [
        suppress(network, suspicious, truth=truth, **options)
        for truth in (marks, marks.numpy(), marks.tolist(), torch.arange(10), list(range(10)), np.arange(10), [], None)
    ]
    share = sum(index < 10 for index in results[0].suspected.tolist()) / 10
    assert [result.precision for result in results] == [share] * 6 + [0.0, None]
    assert share > 0


def test_indices_are_those_of_the_data_set(network, suspicious):
    """The loader leaves samples out, which shifts the places of the others."""
    kept = list(range(5, 200))
    loader = DataLoader(suspicious, batch_size=32, sampler=kept)
    result = suppress(network, loader, truth=range(10), amp=False, **SHORT["abl"])
    assert set(result.suspected.tolist()) <= set(kept)
    assert result.precision == sum(index < 10 for index in result.suspected.tolist()) / 9


def test_a_loader_keeps_its_collate_function(network, suspicious):
    def collate(samples):
        return {"pixels": torch.stack([x for x, _ in samples]), "label": torch.stack([y for _, y in samples])}

    def forward(model, batch):
        return model(batch["pixels"]), batch["label"]

    loader = DataLoader(suspicious, batch_size=32, collate_fn=collate)
    result = suppress(network, loader, forward=forward, amp=False, **SHORT["abl"])
    plain = suppress(network, suspicious, augment=None, **QUICK, **SHORT["abl"])
    assert torch.equal(weights(result.model), weights(plain.model))


@pytest.mark.parametrize("mode", [True, False])
def test_modes_and_frozen_parameters_stay(network, suspicious, mode):
    network.train(mode)
    network[4].bias.requires_grad_(False)
    for method in METHODS:
        result = suppress(network, suspicious, method=method, **QUICK, **SHORT[method])
        for model in (network, result.model):
            assert all(module.training == mode for module in model.modules())
            assert [name for name, x in model.named_parameters() if not x.requires_grad] == ["4.bias"]
        assert torch.equal(result.model[4].bias, network[4].bias)


def test_inplace_trains_the_model_itself_and_undoes_a_failure(network, suspicious, monkeypatch):
    before = weights(network)
    monkeypatch.setattr(abl, "against", lambda *args: (_ for _ in ()).throw(RuntimeError("halt")))
    with pytest.raises(RuntimeError, match="halt"):
        suppress(network, suspicious, inplace=True, **QUICK, **SHORT["abl"])
    assert torch.equal(weights(network), before)
    assert all(parameter.grad is None for parameter in network.parameters())
    monkeypatch.undo()
    result = suppress(network, suspicious, inplace=True, **QUICK, **SHORT["abl"])
    assert result.model is network
    assert not torch.equal(weights(network), before)


def test_results_are_saved_whole(tmp_path, network, suspicious):
    result = suppress(network, suspicious, truth=range(10), **QUICK, **SHORT["abl"])
    result.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors", "result.json"]
    stored = json.loads((tmp_path / "out" / "result.json").read_text())
    assert stored["suspected"] == result.suspected.tolist()
    assert stored["precision"] == result.precision
    assert stored["method"] == "abl"
    assert stored["options"]["ratio"] == 0.05
    assert [row["row"] for row in stored["history"]] == ["setup"] + 7 * ["epoch"]
    loaded = bdfast.io.load_into(copy.deepcopy(network), tmp_path / "out" / "model.safetensors")
    assert torch.equal(weights(loaded), weights(result.model))


def test_warnings_about_the_data(network, suspicious):
    images, labels = suspicious.tensors
    few = TensorDataset(images, labels.clamp(max=3))
    with pytest.warns(UserWarning, match="expected at least one sample per class, got none of 1 of the 5"):
        result = suppress(network, few, method="cbd", **QUICK, **SHORT["cbd"])
    assert len(result.warnings) == 1
    with pytest.warns(UserWarning, match="expected samples of several classes, got one only"):
        suppress(network, TensorDataset(images, torch.zeros_like(labels)), method="cbd", **QUICK, **SHORT["cbd"])
    noise = TensorDataset(images, torch.randint(5, (200,), generator=torch.Generator().manual_seed(0)))
    with pytest.warns(UserWarning, match="model: expected to learn the training data"):
        suppress(network, noise, method="cbd", lr=1e-9, **QUICK, **SHORT["cbd"])


class Restless(Dataset):
    """Changes its images by a generator that nobody seeds."""

    def __init__(self, data):
        self.data, self.draws = data, torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        return image + torch.rand(1, generator=self.draws), label


def test_errors(network, suspicious, tmp_path):
    before = weights(network)
    with pytest.raises(ValueError, match=r"method: expected one of abl, cbd, got 'alb'"):
        suppress(network, suspicious, method="alb")
    with pytest.raises(ValueError, match=r"gama: expected an option of abl .* did you mean"):
        suppress(network, suspicious, gama=0.1)
    with pytest.raises(ValueError, match=r"method: expected its options inside ABLSuppression\(...\), got lr beside"):
        suppress(network, suspicious, method=ABLSuppression(), lr=0.1)
    for truth in (
        [200],
        [-1],
        torch.zeros(199, dtype=torch.bool),
        [0.5],
        [0, 1] * 100,
        torch.zeros(2, 2, dtype=torch.int64),
    ):
        with pytest.raises(ValueError, match=r"truth: expected \[200\] bool"):
            suppress(network, suspicious, truth=truth)
    with pytest.raises(ValueError, match="suspicious: expected at least one sample"):
        suppress(network, TensorDataset(torch.zeros(0, 2, 8, 8), torch.zeros(0)))
    with pytest.raises(ValueError, match=r"suspicious: batch 0: expected labels 0\.\.4"):
        suppress(network, TensorDataset(suspicious.tensors[0], suspicious.tensors[1] + 3))
    with pytest.raises(ValueError, match="suspicious: expected samples that are the same"):
        suppress(network, Restless(suspicious), workdir=tmp_path)
    with pytest.raises(FloatingPointError, match="expected a finite gradient"):
        suppress(network, suspicious, lr=1e30, **QUICK, **SHORT["abl"])
    assert torch.equal(weights(network), before)
