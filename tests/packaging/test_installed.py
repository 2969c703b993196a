"""The wheel in an environment of its own, away from the checkout: every module, every command, a purification."""

import json

import pytest

from bdfast.cli import COMMANDS, native_build
from bdfast.defenses import METHODS

pytestmark = pytest.mark.slow

IMPORT_ALL = """
import importlib, importlib.metadata, importlib.util, json
left_out, files = {}, [str(file) for file in importlib.metadata.files("bdfast")]
modules = sorted(file[:-3].replace("/", ".").removesuffix(".__init__") for file in files if file.endswith(".py"))
for name in modules:
    if name.startswith("bdfast.kernels") and not importlib.util.find_spec("triton"):
        left_out[name] = "Triton is not installed"
        continue
    module = importlib.import_module(name)
    assert "/environment/" in module.__file__, module.__file__
print(json.dumps({"modules": modules, "left_out": left_out}))
"""
HELP_OF_METHODS = """
import bdfast
from bdfast.cli import main
for method in bdfast.list_methods("purify"):
    try:
        main(["purify", method.name, "--help"])
    except SystemExit as stopped:
        assert stopped.code in (0, None), method.name
"""
PURIFY = """
import bdfast, bdfast.report
from dataclasses import replace
from bdfast import scenario
from bdfast.data.digits import digits_source
from bdfast.data.sources import SOURCES
SOURCES["digits"] = lambda: replace(digits_source(), epochs=8)
planted = scenario.backdoored(data="digits", clean_share=0.2)
judge = bdfast.Evaluator(planted.test, planted.triggered)
before = judge(planted.model)
result = bdfast.purify(planted.model, planted.clean, method="ft", epochs=1, lr=0.01)
after = judge(result.model)
facts = {"data": "digits"}
path = bdfast.report.write("report", title="Digits", before=before, after=after, result=result, facts=facts)
print(bdfast.__file__, before, after, path)
"""


def test_every_module_is_imported(installed):
    found = json.loads(installed.output("python", "-W", "error", "-c", IMPORT_ALL))
    assert {"bdfast", "bdfast.kernels", "bdfast.optim", "bdfast.cli.doctor_command"} <= set(found["modules"])
    if found["left_out"]:
        pytest.skip(f"all others were imported, but not these: {found['left_out']}")


def test_version(installed):
    assert installed.output("bdfast", "--version").startswith("bdfast 0.")
    assert installed.output("python", "-m", "bdfast", "--version").startswith("bdfast 0.")


def test_doctor_finds_the_kernels(installed):
    assert "backend torch" in installed.output("bdfast", "doctor")
    backends = json.loads(installed.output("bdfast", "doctor", "--json"))["backends"]
    assert backends["cpu"]["available"] is (native_build.for_native() == [])
    for state in backends.values():
        assert state["available"] is (state["missing"] == [])


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_of_every_command(installed, command):
    assert "usage: bdfast" in installed.output("bdfast", *command.split(), "--help")


def test_help_of_every_method(installed):
    shown = installed.output("python", "-c", HELP_OF_METHODS)
    assert shown.count("usage: bdfast purify") == len(METHODS)


def test_purifies_and_writes_a_report(installed, tmp_path):
    pytest.importorskip("sklearn")
    done = installed.run(["python", "-c", PURIFY], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Digits" in (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "metrics.png").stat().st_size > 1000
