"""A method of the user's own takes part everywhere."""

import json
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import bdfast
from bdfast import attacks, defenses, report
from bdfast.cli import main
from bdfast.defenses import Defense, FTDefense, Outcome
from bdfast.defenses.loss import FineTuningLoss
from bdfast.io import save_weights
from bdfast.models import ModelSpec


@pytest.fixture(autouse=True)
def registered_methods_go_again():
    before = [(package.METHODS, dict(package.METHODS)) for package in (attacks, defenses)]
    yield
    for methods, kept in before:
        methods.clear()
        methods.update(kept)


def halving():
    @bdfast.register("purify", "halve")
    @dataclass(frozen=True)
    class Halve(Defense):
        """Halves every weight. Only a test would do that.

        Attributes:
            factor: What is left.
        """

        factor: float = 0.5

        def run(self, model, clean, run):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(self.factor)
            return Outcome()

    return Halve


def data(count: int = 20) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(count, 1, 4, 4, generator=generator), torch.arange(count) % 2)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


def test_a_registered_method_takes_part():
    halving()
    model = network()
    result = bdfast.purify(model, data(), method="halve", factor=0.25)
    assert torch.equal(result.model[1].weight, model[1].weight * 0.25)
    assert result.method == "halve"
    assert result.options["factor"] == 0.25
    # What it did not say was measured for it.
    torch.testing.assert_close(result.scores.values, 0.75 * model[1].weight.detach().abs().sum(1))
    assert not result.neurons.any()
    (listed,) = [method for method in bdfast.list_methods("purify") if method.name == "halve"]
    assert listed.options == {"factor": 0.5}
    assert listed.summary.startswith("Halves every weight.")
    with pytest.raises(ValueError, match="got 'halfe'; did you mean 'halve'"):
        bdfast.purify(model, data(), method="halfe")


def test_the_same_class_may_come_again_and_another_may_not():
    first = halving()
    assert halving() is not first  # as a cell of a notebook does it
    with pytest.raises(ValueError, match="name: expected one that is free, got 'tsbd', which is TSBDDefense"):
        bdfast.register("purify", "tsbd")(first)


def bare():
    return type("Bare", (FTDefense,), {})


def idle():
    return dataclass(frozen=True)(type("Idle", (Defense,), {}))


@pytest.mark.parametrize(
    ("verb", "name", "make", "error", "message"),
    [
        ("purge", "mine", halving, ValueError, "verb: expected one of poison, detect, purify, suppress, audit, got"),
        ("purify", "My method", halving, ValueError, "name: expected lower-case letters"),
        ("purify", "mine", lambda: print, TypeError, "mine: expected a subclass of bdfast.defenses.base.Defense"),
        ("poison", "mine", halving, TypeError, "mine: expected a subclass of bdfast.attacks.base.Attack"),
        ("purify", "mine", bare, TypeError, "mine: expected a dataclass"),
        ("purify", "mine", idle, TypeError, "mine: expected a class with all its methods, got one without run"),
    ],
)
def test_what_is_no_method_is_refused(verb, name, make, error, message):
    with pytest.raises(error, match=message):
        bdfast.register(verb, name)(make())
    assert name not in defenses.METHODS


PLUGIN = textwrap.dedent(
    """
    from dataclasses import dataclass
    import bdfast

    @bdfast.register("purify", "mine")
    @dataclass(frozen=True)
    class Mine(bdfast.FTDefense):
        '''Fine-tuning of my own.'''

    @bdfast.register("poison", "line")
    @dataclass(frozen=True)
    class Line(bdfast.BadNets):
        '''A line.'''

        def __call__(self, images):
            triggered = images.clone()
            triggered[..., 0, :] = 1
            return triggered
    """
)


def test_the_command_line_and_the_report_learn_of_it(tmp_path, capsys):
    (tmp_path / "my_methods.py").write_text(PLUGIN)
    for index in range(12):
        folder = tmp_path / "images" / str(index % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (index * 20, 0, 0)).save(folder / f"{index}.png")
    spec = ModelSpec(num_classes=2, width=4)
    save_weights(spec.build(), tmp_path / "model.safetensors", description=spec.to_json())
    plugin, images = tmp_path / "my_methods.py", tmp_path / "images"
    given = f"--import {plugin} purify mine {tmp_path / 'model.safetensors'} --data {images} --epochs 1 --no-amp --json"
    main([*given.split(), "--output", str(tmp_path / "out"), "--quiet"])
    assert json.loads(capsys.readouterr().out)["method"] == "mine"
    assert "options of <b>mine</b>" in (tmp_path / "out" / "report.html").read_text()
    main(["--import", str(plugin), "purify", "--help"])
    assert re.search(r"^  mine +Fine-tuning of my own\.$", capsys.readouterr().out, re.M)
    main(["--import", str(plugin), *f"evaluate {tmp_path}/model.safetensors --data {images} --attack line".split()])
    assert "ASR" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py", "--import: expected a file, found no nowhere.py"),
        ("no_such_module_at_all", "--import: expected a file or a module, found no no_such_module_at_all"),
    ],
)
def test_code_that_is_not_there(name, message, capsys):
    with pytest.raises(SystemExit):
        main(["--import", name, "purify", "--help"])
    assert message in capsys.readouterr().err


def test_code_by_the_name_of_a_module(tmp_path):
    (tmp_path / "my_methods.py").write_text(PLUGIN)
    command = [sys.executable, "-m", "bdfast", "--import", "my_methods", "purify", "mine", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Fine-tuning of my own." in done.stdout


def test_the_loss_of_a_fine_tuning_is_a_part_of_its_own():
    seen = []

    class Penalised(FineTuningLoss):
        def prepare(self, batch):
            return super().prepare(batch)._replace(kept=batch[0].sum())

        def of(self, logits, targets, prepared):
            seen.append(prepared.kept)
            return super().of(logits, targets, prepared) + logits.square().mean()

    @dataclass(frozen=True)
    class Mine(FTDefense):
        def loss(self, given, run):
            return Penalised(run, self.label_smoothing)

    options = {"batch_size": 10, "amp": False, "augment": None}
    mine = bdfast.purify(network(), data(), method=Mine(epochs=1, lr=0.01), **options)
    plain = bdfast.purify(network(), data(), method=FTDefense(epochs=1, lr=0.01), **options)
    assert len(seen) == 2
    assert all(x is not None for x in seen)
    assert mine.history[-1].loss > plain.history[-1].loss


class Scaled(nn.Module):
    """A network whose only parameter belongs to no layer that bdfast knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight


def test_a_network_without_neurons_has_no_scores(tmp_path):
    result = bdfast.purify(Scaled(), data(), method="ft", epochs=1, lr=0.01, batch_size=10, amp=False)
    assert result.scores is None
    assert result.neurons is None
    (tmp_path / "scores.csv").write_text("of an earlier result")
    result.save(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["neurons"] == 0
    assert not (tmp_path / "scores.csv").exists()
    page = report.write(tmp_path, title="t", before=None, after=None, result=result, facts={})
    assert "How far the neurons moved" not in page.read_text()


def test_a_method_that_ranks_neurons_refuses_it_before_any_step(monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *args: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match="expected at least one neuron of kinds"):
        bdfast.purify(Scaled(), data(), method="tsbd", n=0.1)
