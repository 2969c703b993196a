"""`bdfast audit`: verdicts, exit statuses, options, and files that are hostile."""

import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from audit_cases import CLASSES, pictures
from safetensors.torch import load_file

import bdfast
from bdfast import audits
from bdfast.attacks import LowFrequency, poisoned
from bdfast.attacks.trigger_files import save_trigger, trigger_path
from bdfast.audits import Audit, BatchStatisticsFinding, Figures, RetuningAudit
from bdfast.cli import audit_command, main
from bdfast.data.data_source import DataSource
from bdfast.data.sources import SOURCES
from bdfast.io.checkpoints import save_weights
from bdfast.models import ModelSpec
from bdfast.training import fit
from bdfast.training.seeds import seeded

ATTACK = bdfast.BadNets(target=1, poison_rate=0.2)
SPEC = ModelSpec(num_classes=CLASSES, in_channels=1, width=4)
QUICK = ["--retuning.epochs", "1", "--retuning.batch-size", "32"]


@pytest.fixture(autouse=True)
def pictures_by_name(monkeypatch):
    source = DataSource("pictures", pictures(80, seed=1), pictures(60, seed=2), "made here")
    monkeypatch.setitem(SOURCES, "pictures", lambda: source)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network with a backdoor and one without."""
    folder = tmp_path_factory.mktemp("networks")
    images = pictures(240, seed=0)
    for name, data in (("before", poisoned(images, ATTACK)), ("after", images)):
        with seeded(0, torch.device("cpu")):
            model = SPEC.build()
        fit(model, data, epochs=8, batch_size=32, amp=False)
        save_weights(model, folder / f"{name}.safetensors", description=SPEC.to_json())
    return folder


def audit(weights, *options, after="after", status=0):
    pair = [str(weights / f"{name}.safetensors") for name in ("before", after)]
    arguments = ["audit", *pair, "--data", "pictures", "--quiet", "--no-amp", *options]
    if status == 0:
        main(arguments)
        return
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == status


TRIGGERED = ["--attack", "badnets", "--target", "1", "--test", "pictures"]


def test_json_file_and_python_say_the_same(weights, tmp_path, capsys):
    options = ["--methods", "batch_statistics", "retuning", *QUICK, *TRIGGERED]
    audit(weights, *options, "--json", "--output", str(tmp_path / "out"), "--workdir", str(tmp_path / "work"))
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "audit.json").read_text())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["audit.json"]
    assert any((tmp_path / "work").iterdir())
    models = [audit_command.ModelInput(weights / f"{x}.safetensors").load()[0] for x in ("before", "after")]
    expected = bdfast.audit(
        *models,
        pictures(80, seed=1),
        bdfast.Triggered(pictures(60, seed=2), bdfast.BadNets(target=1)),
        methods=["batch_statistics", RetuningAudit(epochs=1, batch_size=32)],
        amp=False,
    ).as_json()
    assert printed["rate"] == "ASR"
    assert printed["before"]["ASR"] > 0.9
    changing = {"seconds", "notes"}  # `test` is named there
    assert {k: v for k, v in printed.items() if k not in changing} == json.loads(
        json.dumps({k: v for k, v in expected.items() if k not in changing})
    )


def test_strict_tells_what_is_not_removed(weights, capsys):
    options = ["--methods", "batch_statistics", *TRIGGERED]
    audit(weights, *options, after="before")
    assert capsys.readouterr().out == ""  # under --quiet
    audit(weights, *options, "--strict", after="before", status=1)
    audit(weights, *options, "--strict")


@pytest.mark.parametrize(
    ("rates", "status", "strict"),
    [((0.9, 0.9), "not removed", 1), ((0.0, 0.8), "superficial", 1), ((0.1, 0.1), "no sign", 0), ((None, None), "", 0)],
)
@pytest.mark.parametrize("rate_name", ["ASR", "surrogate rate"])
def test_the_table_and_the_exit_status(weights, monkeypatch, capsys, rates, status, strict, rate_name):
    monkeypatch.setenv("COLUMNS", "200")
    shown = [Figures(0.5, rate) for rate in rates]
    finding = BatchStatisticsFinding(rate_name, 1, *shown, *shown)
    result = Audit(
        Figures(0.75, 0.95), shown[0], None, {"mine": finding}, rate_name, None, ["a [note]"], {}, 1.0, ["x"]
    )
    seen = {}
    monkeypatch.setattr(audit_command, "audit", lambda *args, **kwargs: seen.update(kwargs) or result)
    audit(weights, "--strict", "--seed", "3", "--batch-size", "7", "--test", "pictures", status=strict)
    assert (seen["seed"], seen["batch_size"], seen["amp"], seen["methods"]) == (3, 7, False, None)
    assert len(seen["test"]) == 60
    assert capsys.readouterr().out == ""
    arguments = [str(weights / f"{name}.safetensors") for name in ("before", "after")]
    main(["audit", *arguments, "--data", "pictures"])
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row]
    assert rows[0] == ["verdict", result.verdict]
    assert rows[0][1].startswith(status or "not measured")
    names = ("O-ASR", "P-ASR, mine") if rate_name == "ASR" else ("surrogate rate", "surrogate rate, mine")
    if rates[0] is not None:
        assert rows[1:3] == [[name, f"{rate:.1%}"] for name, rate in zip(names, rates, strict=True)]
    assert ["ACC before, after", "75.0%, 50.0%"] in rows
    assert [row for row in rows if row[0] == "finding"] == [["finding", x] for x in result.sentences()]
    assert rows[-2:] == [["note", "a [note]"], ["warning", "x"]]


def test_without_an_attack_there_are_surrogate_rates(weights, capsys):
    audit(weights, "--methods", "batch_statistics", "--target", "1", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["rate"] == "surrogate rate"
    assert "ASR" not in printed["before"]
    assert printed["trigger"]["target"] == 1
    assert printed["notes"][0].startswith("Measured on 20 held-out images")


def test_a_clean_network_beside(weights, capsys):
    clean = str(weights / "after.safetensors")
    audit(weights, "--methods", "retuning", *QUICK, *TRIGGERED, "--clean-model", clean, "--json", after="before")
    printed = json.loads(capsys.readouterr().out)
    assert printed["clean_model"]["ASR"] < 0.3
    assert printed["results"]["retuning"]["control"] is not None


def test_the_spec_options_hold_for_both(weights, tmp_path, capsys):
    for name in ("before", "after"):
        torch.save(load_file(weights / f"{name}.safetensors"), tmp_path / f"{name}.pt")
    pair = [str(tmp_path / f"{name}.pt") for name in ("before", "after")]
    options = ["--data", "pictures", "--quiet", "--json", "--methods", "batch_statistics", *TRIGGERED]
    main(["audit", *pair, *options, "--num-classes", "4", "--in-channels", "1", "--width", "4"])
    plain = json.loads(capsys.readouterr().out)
    audit(weights, "--json", "--methods", "batch_statistics", *TRIGGERED)
    described = json.loads(capsys.readouterr().out)
    assert plain["before"] == described["before"]
    assert plain["results"] == described["results"]


def test_the_trigger_lies_beside_the_first_network_or_where_it_is_said(weights, tmp_path, capsys):
    made = LowFrequency(target=1).with_state({"pattern": torch.rand(1, 8, 8)})
    options = ["--attack", "lf", "--target", "1", "--test", "pictures", "--methods", "batch_statistics", "--json"]
    audit(weights, *options, status=2)
    assert "before.trigger.safetensors, got no such file" in capsys.readouterr().err
    save_trigger(made, tmp_path / "elsewhere.safetensors")
    audit(weights, *options, "--trigger", str(tmp_path / "elsewhere.safetensors"))
    said = json.loads(capsys.readouterr().out)
    assert said["trigger"] == {"kind": "attack", "name": "LowFrequency", "target": 1}
    beside = trigger_path(weights / "before.safetensors")
    save_trigger(made, beside)
    try:
        audit(weights, *options)
    finally:
        beside.unlink()
    assert json.loads(capsys.readouterr().out)["after"] == said["after"]


@dataclass(frozen=True)
class Mine(audits.AuditMethod):
    """An audit of a user.

    Attributes:
        rate: What it says.
    """

    rate: float = 0.25

    def run(self, case, run):
        return BatchStatisticsFinding(case.rate_name, 1, *4 * [Figures(0.5, self.rate)])


def test_an_audit_of_a_user_takes_part(weights, monkeypatch, capsys):
    monkeypatch.setitem(audits.METHODS, "mine", Mine)
    audit(weights, "--methods", "mine", "--mine.rate", "0.75", *TRIGGERED, "--json")
    assert json.loads(capsys.readouterr().out)["ASR after audits"] == {"mine": 0.75}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "retunning"], "did you mean 'retuning'"),
        (["--attack", "badnet"], "did you mean 'badnets'"),
        (["--attack", "badnets"], "test: expected test images"),
        (["--trigger", "x"], "trigger: expected an attack beside it"),
        (["--target", "4"], "target: expected a class in 0..3, got 4"),
        ([*TRIGGERED, "--target", "-1"], "target: expected a class in 0..3, got -1"),
        (["--retuning.epochs", "2"], "retuning: expected options of audits that are named in --methods"),
        (["--methods", "path", *QUICK], "retuning: expected options of audits that are named in --methods"),
        (["--test", "picture"], "did you mean 'pictures'"),
        (["--clean-model", "nowhere.pt"], "path: expected a checkpoint, found no file nowhere.pt"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(weights, options, message, capsys):
    audit(weights, *options, status=2)
    error = capsys.readouterr().err
    assert error.startswith("bdfast audit: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 5}, "after: expected a network with the num_classes of `before`, 4, got 5"),
        ({"in_channels": 3}, "after: expected a network with the in_channels of `before`, 1, got 3"),
    ],
)
def test_networks_of_other_tasks_are_refused(weights, tmp_path, change, message, capsys):
    spec = replace(SPEC, **change)
    save_weights(spec.build(), tmp_path / "other.safetensors", description=spec.to_json())
    pair = [str(weights / "before.safetensors"), str(tmp_path / "other.safetensors")]
    with pytest.raises(SystemExit):
        main(["audit", *pair, "--data", "pictures"])
    assert message in capsys.readouterr().err


def test_classes_in_another_order_are_refused(weights, tmp_path, capsys):
    model = SPEC.build()
    for name, names in (("a", "abcd"), ("b", "abdc")):
        spec = replace(SPEC, class_names=tuple(names))
        save_weights(model, tmp_path / f"{name}.safetensors", description=spec.to_json())
    with pytest.raises(SystemExit):
        main(["audit", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--data", "pictures"])
    assert "after: expected a network with the class_names of `before`" in capsys.readouterr().err


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", ["hostile.pt", "hostile.safetensors", "torn.safetensors", "archive.pt"])
def test_hostile_weights_exit_with_2_and_execute_nothing(weights, place, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if name == "archive.pt":
        torch.save({"state_dict": Hostile()}, name)
    elif name == "torn.safetensors":
        Path(name).write_bytes((weights / "before.safetensors").read_bytes()[:200])
    else:
        Path(name).write_bytes(pickle.dumps({"state_dict": Hostile()}))
    files = 3 * [str(weights / "before.safetensors")]
    files[place] = name
    with pytest.raises(SystemExit) as ended:
        main(["audit", *files[:2], "--clean-model", files[2], "--data", "pictures"])
    assert ended.value.code == 2
    assert not Path("executed").exists()
    assert capsys.readouterr().err.startswith("bdfast audit: ")


def test_an_option_out_of_range_exits_with_2(weights, capsys):
    audit(weights, "--methods", "retuning", "--retuning.epochs", "0", status=2)
    assert "epochs: expected at least 1" in capsys.readouterr().err


def test_help_has_the_options_of_each_audit(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["audit", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for word in ("BEFORE AFTER", "--retuning.epochs", "--path.points", "--strict"):
        assert word in shown
