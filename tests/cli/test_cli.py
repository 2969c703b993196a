import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from bdfast.cli import main
from bdfast.data import ImageTensors
from bdfast.data.digits import digits_source
from bdfast.data.sources import SOURCES
from bdfast.defenses import METHODS, UAUDefense
from bdfast.defenses.purification import purify
from bdfast.io.checkpoints import save_weights
from bdfast.models import ModelSpec
from bdfast.training import fit


@pytest.fixture
def small_demo(monkeypatch):
    """The demo on digits, with less of everything."""
    monkeypatch.setitem(SOURCES, "fashion-mnist", lambda: replace(digits_source(), epochs=8))
    monkeypatch.setattr("bdfast.cli.demo_command.purify", partial(purify, updates=10))
    monkeypatch.setattr("bdfast.inversion.least_length.STEPS", 1)
    monkeypatch.setattr("bdfast.inversion.universal.JUDGED", 4)


@pytest.fixture
def checkpoint(tmp_path):
    """A network that tells dark images from bright ones."""
    spec = ModelSpec(num_classes=2, in_channels=3, width=4, class_names=("cat", "dog"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spec.build()
        images = torch.randint(0, 128, (32, 3, 16, 16)) + 128 * (torch.arange(32) % 2).view(-1, 1, 1, 1)
        fit(model, ImageTensors(images.to(torch.uint8), torch.arange(32) % 2), epochs=4, batch_size=8, amp=False)
        save_weights(model, tmp_path / "model.safetensors", description=spec.to_json())
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """Sixteen images of two classes."""
    values = np.random.default_rng(0)
    for darkest, label in ((0, "cat"), (128, "dog")):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(8):
            pixels = values.integers(darkest, darkest + 128, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{index}.png")
    return tmp_path / "images"


def test_demo_leaves_report_and_metrics(tmp_path, small_demo, capsys):
    output = tmp_path / "out"
    main(["demo", "--output", str(output), "--clean-share", "0.2", "--json", "--quiet"])
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((output / "metrics.json").read_text())
    assert printed == written
    assert set(written) == {"before", "after", "der", "found", "verdict", "seconds", "options"}
    assert set(written["before"]) == set(written["after"]) == {"acc", "asr", "ra"}
    assert written["before"]["asr"] > 0.9
    assert 0 <= written["der"] <= 1
    assert written["options"]["attack"] == "badnets"
    assert written["options"]["uau.lr"] in (None, *UAUDefense.rates)
    assert written["verdict"]["status"] in ("removed", "reduced", "not removed", "nothing found")
    page = (output / "report.html").read_text()
    assert "scikit-learn's digits" in page.replace("&#39;", "'")
    expected = {"metrics.png", "weight_change.png", "accuracy.png", "sharpness.png", "path.png", "examples.png"}
    assert expected <= {p.name for p in output.iterdir()}

    # Both models can be evaluated again from their files alone, and give the figures of the report.
    demo_source = digits_source()
    for name, part in (("backdoored.safetensors", "before"), ("purified/model.safetensors", "after")):
        main_evaluate(output / name, demo_source)
        again = json.loads(capsys.readouterr().out)
        assert again["acc"] == pytest.approx(written[part]["acc"], abs=0.01)
        assert again["asr"] == pytest.approx(written[part]["asr"], abs=0.01)


def main_evaluate(path, source, *options, attack="badnets"):
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(SOURCES, "fashion-mnist", lambda: source)
        main(["evaluate", str(path), "--data", "fashion-mnist", "--attack", attack, "--json", *options])


def test_demo_with_an_attack_that_needs_a_network(tmp_path, small_demo, capsys):
    arguments = ["--attack", "lf", "--method", "ft", "--clean-share", "0.2", "--json", "--quiet"]
    main(["demo", "--output", str(tmp_path), *arguments])
    printed = json.loads(capsys.readouterr().out)
    assert printed["options"]["attack.amplitude"] == 0.2
    assert "attack.state" not in printed["options"]
    assert printed["before"]["asr"] > 0.9
    # The trigger lies beside the backdoored network, and can be given for another one.
    trigger = tmp_path / "backdoored.trigger.safetensors"
    for name, part, options in (
        ("backdoored.safetensors", "before", []),
        ("purified/model.safetensors", "after", ["--trigger", str(trigger)]),
    ):
        main_evaluate(tmp_path / name, digits_source(), *options, attack="lf")
        again = json.loads(capsys.readouterr().out)
        assert again["asr"] == pytest.approx(printed[part]["asr"], abs=0.01)
    with pytest.raises(SystemExit):
        main_evaluate(tmp_path / "purified/model.safetensors", digits_source(), attack="lf")
    assert "trigger: expected the trigger of LowFrequency" in capsys.readouterr().err


def test_demo_shows_a_table(tmp_path, small_demo, capsys):
    main(["demo", "--output", str(tmp_path), "--clean-share", "0.2", "--attack", "blended"])
    shown = capsys.readouterr().out
    assert "backdoored" in shown
    assert "purified" in shown
    assert "ASR" in shown


def test_purify_and_evaluate_a_users_model(tmp_path, checkpoint, folder, capsys):
    out = tmp_path / "purified"
    main(
        f"purify tsbd {checkpoint} --data {folder} --output {out} --n 0.2 --epochs 1 --lr 0.03 --unlearn-lr 0.1 "
        "--batch-size 8 --no-amp --images 12 --json --quiet".split()
    )
    summary = json.loads(capsys.readouterr().out)
    assert summary["options"]["n"] == 0.2
    assert summary["neurons_reset"] == int(0.2 * summary["neurons"])
    assert (out / "report.html").exists()
    strict = (
        f"purify ft {checkpoint} --data {folder} --output {out / 'strict'} --epochs 1 --lr 0.01 --no-amp --json --quiet"
    )
    with pytest.raises(SystemExit) as stopped:
        main([*strict.split(), "--strict"])
    assert stopped.value.code == 1  # with a rate there is no verdict
    assert (out / "strict" / "model.safetensors").exists()
    capsys.readouterr()
    main(["evaluate", str(out / "model.safetensors"), "--data", str(folder), "--recalibrate-on", str(folder), "--json"])
    metrics = json.loads(capsys.readouterr().out)
    assert 0 <= metrics["acc"] <= 1
    assert metrics["asr"] is None


def test_purify_without_an_image(tmp_path, checkpoint, capsys):
    main(f"purify clp {checkpoint} --u 1 --output {tmp_path / 'out'} --json --quiet".split())
    summary = json.loads(capsys.readouterr().out)
    assert 0 < summary["neurons_reset"] < summary["neurons"]
    assert summary["options"]["u"] == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<dt>Clean images</dt><dd>none</dd>" in page
    with pytest.raises(SystemExit):
        main(f"purify ft {checkpoint} --output {tmp_path / 'out'}".split())
    assert (
        "clean: expected images, without which ft cannot work, got None; pass some (--data" in capsys.readouterr().err
    )


def test_doctor(capsys):
    main(["doctor"])
    assert "backend torch" in capsys.readouterr().out
    main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["torch"]["available"] is True
    assert report["backends"]["cuda"]["reason"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["purify", "--help"], ["purify"]])
def test_help(arguments, capsys):
    main(arguments)
    assert "usage: bdfast" in capsys.readouterr().out


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.startswith("bdfast 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["purfy"], "did you mean 'purify'"),
        (["purify", "tsdb"], "did you mean 'tsbd'"),
        (["purify", "tsbd", "nowhere.pt", "--data", "x"], "path: expected a checkpoint, found no file nowhere.pt"),
        (["evaluate", "nowhere.pt", "--data", "x"], "path: expected a checkpoint, found no file nowhere.pt"),
        (["evaluate", "x.pt", "--data", "x", "--attack", "badnet"], "did you mean 'badnets'"),
        (["demo", "--attack", "magic"], "attack: expected one of badnets, blended, "),
        (
            ["demo", "--method", "magic"],
            f"method: expected one of {', '.join(METHODS)}, got 'magic'",
        ),
        (["demo", "--clean-share", "2"], r"clean_share: expected a fraction in (0, 1), got 2.0"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_wrong_architecture_is_explained(checkpoint, folder, capsys, tmp_path):
    torch.save(ModelSpec(num_classes=5, width=4).build().state_dict(), tmp_path / "plain.pt")
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "plain.pt"), "--data", str(folder), "--width", "4"])
    assert "2 of another shape (the first is 'linear.bias')" in capsys.readouterr().err
