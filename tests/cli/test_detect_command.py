"""`bdfast detect`: exit statuses, formats, and files that are hostile."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jsonschema
import pytest
import torch

from bdfast.cli import main
from bdfast.detectors import METHODS, Calibration, Detector, Finding
from bdfast.io.checkpoints import save_weights
from bdfast.models import ModelSpec

SCHEMA = json.loads((Path(__file__).parent / "sarif-schema-2.1.0.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Fixed(Detector):
    """Gives every network the same score.

    Attributes:
        score: That score.
    """

    scored_by: ClassVar[str] = "as told"
    published_threshold: ClassVar[float | None] = 0.5
    score: float = 0.0

    def run(self, model, clean, run):
        evidence = {"length": [float("nan"), 0.25]}
        return Finding(self.score, (1,), evidence, trigger=torch.rand(1, 28, 28), notes=("a note",))


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    monkeypatch.setitem(METHODS, "fixed", Fixed)


@pytest.fixture
def weights(tmp_path):
    spec = ModelSpec(num_classes=10, in_channels=1, width=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_weights(spec.build(), tmp_path / "a model.safetensors", description=spec.to_json())
    return tmp_path / "a model.safetensors"


def detect(weights, *options, status=0):
    arguments = ["detect", "fixed", str(weights), "--data", "digits", "--images", "64", "--quiet", *options]
    if status == 0:
        main(arguments)
    else:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == status


@pytest.mark.filterwarnings("ignore:clean. expected a model")
@pytest.mark.parametrize("format", ["table", "json", "sarif"])
@pytest.mark.parametrize("score", [0.0, 0.75])
def test_the_exit_status_says_whether_there_is_a_finding(weights, format, score, capsys):
    detect(weights, "--score", str(score), "--format", format, status=int(score > 0.5))
    out = capsys.readouterr().out
    if format == "table":
        assert ("not suspicious" in out) == (score < 0.5)
        assert "1: 0.25" in out
        assert "nan" not in out
        return
    content = json.loads(out)
    if format == "json":
        assert content["suspicious"] == (score > 0.5)
        assert content["evidence"] == {"length": [None, 0.25]}
        return
    jsonschema.Draft7Validator(SCHEMA).validate(content)
    (result,) = content["runs"][0]["results"]
    assert (result["kind"], result["level"]) == (("fail", "warning") if score > 0.5 else ("pass", "none"))
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].endswith("/a%20model.safetensors")


def test_the_schema_refuses_what_is_no_sarif():
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(SCHEMA).validate({"version": "2.1.0", "runs": [{"results": []}]})


@pytest.mark.filterwarnings("ignore:clean. expected a model")
def test_a_finding_may_pass(weights, capsys):
    detect(weights, "--score", "0.75", "--fail-on", "never")
    assert "suspicious" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:clean. expected a model")
def test_threshold_calibration_and_output_are_taken(weights, tmp_path, capsys):
    detect(weights, "--score", "0.75", "--threshold", "0.8", "--output", str(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["detection.json", "trigger.png"]
    Calibration("fixed", {"score": 0.75}, tuple(i / 20 for i in range(20)), "ours").save(tmp_path / "mine.json")
    capsys.readouterr()
    detect(weights, "--score", "0.75", "--calibration", str(tmp_path / "mine.json"), "--format", "json")
    assert json.loads(capsys.readouterr().out)["threshold"] == 0.95


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("name", ["missing.safetensors", "hostile.pt", "hostile.safetensors", "torn.safetensors"])
def test_what_cannot_be_read_exits_with_2_and_executes_nothing(weights, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if name.startswith("hostile"):
        Path(name).write_bytes(pickle.dumps({"state_dict": Hostile()}))
    if name.startswith("torn"):
        Path(name).write_bytes(weights.read_bytes()[:200])
    detect(name, status=2)
    assert not Path("executed").exists()
    assert capsys.readouterr().err.startswith("bdfast detect: ")


def test_a_hostile_archive_executes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Hostile()}, "hostile.pt")
    detect("hostile.pt", status=2)
    assert not Path("executed").exists()


@pytest.mark.parametrize("images", ["0", "-1"])
def test_a_number_of_images_below_one_is_refused(weights, images, capsys):
    detect(weights, "--images", images, status=2)
    assert "images: expected at least 1, got" in capsys.readouterr().err


def test_help_lists_the_methods(capsys):
    main(["detect", "--help"])
    out = capsys.readouterr().out
    assert "bdfast detect METHOD WEIGHTS" in out
    assert "surrogate" in out
    with pytest.raises(SystemExit) as ended:
        main(["detect", "surogate"])
    assert ended.value.code == 2
    assert "did you mean 'surrogate'?" in capsys.readouterr().err
