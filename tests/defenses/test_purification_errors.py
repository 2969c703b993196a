"""Everything that a user can get wrong: one clear error, and nothing has changed."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import bdfast
from bdfast.defenses import TSBDDefense


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).mean((2, 3)))


def data(images=(8, 1, 6, 6), labels=3):
    return TensorDataset(torch.rand(images), torch.arange(images[0]) % labels)


def frozen() -> nn.Module:
    return Small().requires_grad_(False)


def with_nan() -> nn.Module:
    model = Small()
    with torch.no_grad():
        model.linear.weight[1, 2] = float("nan")
    return model


def without_neurons() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36))


CASES = {
    "empty data": (Small, data((0, 1, 6, 6)), {}, "clean: expected at least one sample, got an empty data set"),
    "labels outside": (Small, data(labels=5), {}, r"clean: batch 0: expected labels 0..2, .* got 0..4; relabel"),
    "image shape": (
        Small,
        data((8, 3, 6, 6)),
        {},
        r"clean: batch 0: expected input that the model takes, got \[8, 3",
    ),
    "no neurons": (without_neurons, data(), {"method": "tsbd"}, "neuron"),
    "frozen": (frozen, data(), {}, "model: expected parameters that can be trained, got a model that is frozen"),
    "NaN weights": (with_nan, data(), {}, "model: expected finite weights, got NaN or infinity in linear.weight"),
    "triggered data": (
        Small,
        TensorDataset(torch.rand(8, 1, 6, 6), torch.zeros(8).long(), torch.zeros(8).long()),
        {},
        r"clean: batch 0: expected 1 label\(s\) per sample, got 2; a clean set gives \(image, label\)",
    ),
    "method": (Small, data(), {"method": "tsdb"}, r"method: expected one of uau, .*got 'tsdb'; did you mean 'tsbd'?"),
    "option": (
        Small,
        data(),
        {"method": "tsbd", "alhpa": 1},
        r"alhpa: expected an option of tsbd \(.*did you mean 'alpha'?",
    ),
    "options twice": (
        Small,
        data(),
        {"method": TSBDDefense(), "n": 0.1},
        "method: expected its options inside TSBD",
    ),
    "n is 0": (Small, data(), {"method": "tsbd", "n": 0.0}, r"n: expected a share in \(0, 1\], got 0.0"),
    "n above 1": (Small, data(), {"method": "tsbd", "n": 1.5}, r"n: expected a share in \(0, 1\], got 1.5"),
    "m is negative": (Small, data(), {"method": "tsbd", "m": -0.1}, r"m: expected a share in \(0, 1\], got -0.1"),
    "learning rate": (Small, data(), {"lr": 0.0}, "lr: expected a positive number, got 0.0"),
    "layers": (Small, data(), {"method": "tsbd", "layers": "convolution"}, "convolution"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_wrong_use_is_explained_and_changes_nothing(case):
    make, clean, arguments, message = case
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        bdfast.purify(model, clean, inplace=True, **arguments)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert model.training


def test_a_stream_is_refused():
    with pytest.raises(TypeError, match="clean: expected a map-style data set"):
        bdfast.purify(Small(), iter([]))


def test_unlearning_that_does_not_arrive_says_so():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)), torch.randn(40, 2)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-9.0, 0.0], [9.0, 0.0]]))
        model[1].bias.zero_()
    clean = TensorDataset(x, (x[:, 0] > 0).long())
    with pytest.raises(RuntimeError, match=r"unlearn_epochs: expected the clean accuracy to fall to .* got 100.0%"):
        bdfast.purify(model, clean, method="tsbd", n=0.5, lr=0.03, unlearn_epochs=1, unlearn_lr=1e-9, amp=False)


def test_a_gradient_that_explodes_is_named_and_leaves_the_model():
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="expected a finite gradient, got NaN or infinity"):
        bdfast.purify(
            model,
            data(),
            method="ft",
            inplace=True,
            amp=False,
            forward=lambda m, batch: (m(batch[0]) * (float("nan") if m.training else 1.0), batch[1]),
        )
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_file_that_is_no_checkpoint(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x80\x04\x95 nothing of use")
    with pytest.raises(
        ValueError, match=r"path: expected a safetensors file or a state dict in .*, got something else"
    ):
        bdfast.io.load_weights(path)
    with pytest.raises(FileNotFoundError, match="path: expected a checkpoint, found no file"):
        bdfast.io.load_weights(tmp_path / "missing.pt")
