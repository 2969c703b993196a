"""Weights that others saved, from the command line."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bdfast.cli import main
from bdfast.cli.inputs import ModelInput
from bdfast.io.checkpoints import save_weights
from bdfast.models import ModelSpec

SPEC = ModelSpec(num_classes=2, width=4)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture
def state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SPEC.build().state_dict()


@pytest.fixture
def folder(tmp_path):
    values = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(8):
            pixels = values.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{index}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("prefix", ["", "module.", "network.", "_orig_mod.model."])
def test_mean_and_std_with_weights_that_know_nothing_of_them(tmp_path, folder, state, prefix, capsys):
    torch.save({"net": {prefix + name: value for name, value in state.items()}, "acc": 93.0}, tmp_path / "a.pth")
    spec = ModelSpec(num_classes=2, width=4, mean=MEAN, std=STD)
    model, _ = ModelInput(tmp_path / "a.pth", spec).load()
    plain = SPEC.build().eval()
    plain.load_state_dict(state)
    images = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    model.eval().cpu()
    assert torch.equal(model(images), plain((images - mean) / std))
    assert not torch.equal(model(images), plain(images))

    options = f"--data {folder} --num-classes 2 --width 4 --mean 0.5 0.4 0.3 --std 0.2 0.3 0.4 --json"
    main(["evaluate", str(tmp_path / "a.pth"), *options.split()])
    with_option = json.loads(capsys.readouterr().out)["acc"]
    save_weights(model, tmp_path / "own.safetensors", description=spec.to_json())
    main(["evaluate", str(tmp_path / "own.safetensors"), "--data", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out)["acc"] == with_option

    out = tmp_path / "purified"
    main(
        [
            "purify",
            "ft",
            str(tmp_path / "a.pth"),
            *options.split(),
            "--output",
            str(out),
            "--epochs",
            "1",
            "--lr",
            "0.01",
            "--quiet",
        ]
    )
    main(["evaluate", str(out / "model.safetensors"), "--data", str(folder), "--json"])


def test_a_namespace_in_the_file_is_one_line(tmp_path, folder, state, capsys):
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "a.pth"), "--data", str(folder)])
    error = capsys.readouterr().err
    assert error.startswith("bdfast evaluate: path: ")
    assert "'argparse.Namespace'" in error
    assert error.count("\n") == 1


def test_a_small_file_that_describes_a_huge_network_is_refused(tmp_path, folder, state, capsys):
    huge = ModelSpec(num_classes=2, width=999_999)
    model = SPEC.build()
    save_weights(model, tmp_path / "a.safetensors", description=huge.to_json())
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "a.safetensors"), "--data", str(folder)])
    assert "weights: expected the weights of the network that" in capsys.readouterr().err
