"""`bdfast doctor` names what a backend lacks, and the command that brings it."""

import sys
from pathlib import Path

import pytest
import torch

from bdfast.cli import doctor_command, main, native_build
from bdfast.cli.native_build import REBUILD, Missing
from bdfast.ops.backends import BackendStatus

NOTHING_IS_HERE = {
    name: BackendStatus(name == "torch", "" if name == "torch" else "not here")
    for name in ("cpu", "torch", "cuda", "triton")
}


@pytest.fixture(autouse=True)
def no_choices(monkeypatch):
    for name in ("CC", "CXX", "CFLAGS", "CPPFLAGS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """The only folder in which programs are found."""
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    (tmp_path / "programs").mkdir()
    return tmp_path / "programs"


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def toolkit(home: Path, version: str) -> str:
    script(home / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {version}, V{version}.0'")
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    return str(home)


def test_nothing_is_missing_where_all_is_there(programs):
    script(programs / "c++", "exit 0")
    script(programs / "ninja", "exit 0")
    assert native_build.for_native() == []
    assert native_build.ninja() is None


def test_no_compiler(programs):
    assert native_build.compiler() == Missing("a C++ compiler", "apt-get install g++")
    assert native_build.ninja().mend == "pip install ninja"


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_variable_that_names_no_program(programs, monkeypatch, variable):
    script(programs / "c++", "exit 0")
    monkeypatch.setenv(variable, "icpx -O2")
    assert native_build.compiler() == Missing(
        f"a C++ compiler ({variable} is 'icpx', which is no program)", f"unset {variable}"
    )


def test_compiler_that_does_not_work(programs):
    script(programs / "c++", "exit 1")
    assert "c++ cannot compile an empty program" in native_build.compiler().what


def test_no_headers_of_python(programs):
    script(programs / "c++", 'read text; case "$text" in *Python.h*) exit 1;; esac')
    (problem,) = native_build.for_native()
    assert problem.what.startswith("Python.h")
    assert problem.mend == f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev"


def test_headers_are_looked_for_without_a_compiler_too(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "_include_folders", lambda: [str(tmp_path)])
    assert [problem.what for problem in native_build.for_native()] == [
        "a C++ compiler",
        "Python.h, the headers of Python",
    ]
    (tmp_path / "Python.h").touch()
    assert [x.what for x in native_build.for_native()] == ["a C++ compiler"]


def test_free_threaded_python_has_no_stable_abi(monkeypatch):
    monkeypatch.setattr(native_build.sysconfig, "get_config_var", lambda name: int(name == "Py_GIL_DISABLED"))
    assert "free-threaded" in native_build.stable_abi().what


def test_toolkit_must_be_of_the_major_version_of_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", toolkit(tmp_path / "cuda", "12.4"))
    assert native_build.nvcc_version(native_build.cuda_home()) == (12, 4)
    assert native_build.for_cuda("12.8") == []
    assert native_build.for_cuda(None) == []
    (problem,) = native_build.for_cuda("13.0")
    assert problem.what == "a CUDA toolkit 13.0 (nvcc is 12.4, torch is built for 13.0)"
    assert problem.mend == "apt-get install cuda-toolkit-13-0 && export CUDA_HOME=/usr/local/cuda-13.0"


def test_toolkit_that_is_not_there_or_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (problem,) = native_build.for_cuda("13.0")
    assert problem.mend == "unset CUDA_HOME"
    toolkit(tmp_path, "13.0")
    script(tmp_path / "bin" / "nvcc", "exit 1")
    (problem,) = native_build.for_cuda("13.0")
    assert "tells no version" in problem.what


def test_toolkit_is_found_by_its_nvcc(tmp_path, monkeypatch, programs):
    usual = native_build.cuda_home()
    home = toolkit(tmp_path / "cuda", "13.0")
    (programs / "nvcc").symlink_to(tmp_path / "cuda" / "bin" / "nvcc")
    assert native_build.cuda_home() == usual or native_build.cuda_home() == Path(home)
    monkeypatch.setenv("CUDA_PATH", home)
    assert native_build.cuda_home() == Path(home)


def test_every_backend_that_is_not_ready_has_its_steps(programs, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor_command.importlib.util, "find_spec", lambda name: None)
    missing = doctor_command.missing_for(NOTHING_IS_HERE)
    mends = {name: [step.mend for step in steps] for name, steps in missing.items()}
    assert mends == {
        "cpu": ["apt-get install g++", "pip install ninja", f"{REBUILD}  # in the source tree"],
        "torch": [],
        "cuda": [
            "apt-get install g++",
            "unset CUDA_HOME",
            "pip install ninja",
            f"BDFAST_CUDA=1 {REBUILD}  # in the source tree",
            "nvidia-smi  # must list it",
        ],
        "triton": ["pip install triton", "nvidia-smi  # must list it"],
    }


def test_build_whose_tools_are_all_here_is_to_say_why_it_fails(programs, monkeypatch):
    for name in ("c++", "ninja"):
        script(programs / name, "exit 0")
    monkeypatch.setattr(doctor_command.importlib.util, "find_spec", lambda name: None)
    (step,) = doctor_command.missing_for(NOTHING_IS_HERE)["cpu"]
    assert "it says why it fails" in step.what
    assert step.mend.startswith("pip install -v --no-build-isolation")


def test_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    for name in ("cuda", "triton"):
        *_, last = doctor_command.missing_for(NOTHING_IS_HERE)[name]
        assert last.mend == "pip install --force-reinstall torch"


def test_gpu_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    *_, last = doctor_command.missing_for(NOTHING_IS_HERE)["triton"]
    assert last.what == "a GPU of compute capability 8.0 or newer (this one has 7.5)"


def test_steps_are_printed_in_lines_that_can_be_copied(capsys, monkeypatch):
    monkeypatch.setattr(doctor_command, "backends", lambda: NOTHING_IS_HERE)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setenv("COLUMNS", "60")
    main(["doctor"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "backend cuda needs, in this order:" in lines
    assert "unset CUDA_HOME" in lines
    assert f"BDFAST_CUDA=1 {REBUILD}  # in the source tree" in lines
