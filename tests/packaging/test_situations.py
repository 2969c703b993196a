"""A build never fails for want of what only the native kernels need: it says in one line what it leaves out.

Where it does not matter what is compiled, a stand-in for the compiler makes an empty object of every file.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from building import clean_environment, pip_install, virtual_environment

pytestmark = pytest.mark.slow

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
WORKS = """
import sys; sys.path.append(sys.argv[1])
import bdfast, torch
assert bdfast.__file__.startswith(sys.argv[1]), bdfast.__file__
assert bdfast.ops.neuron_norms([torch.ones(2, 3)]).tolist() == [3, 3]
status = bdfast.backends()["cpu"]
assert not status.available
assert "bdfast doctor" in status.reason, status.reason
"""
# Gives torch another CUDA version, or takes torch away.
OTHER_TORCH = """
import importlib.machinery, sys
class Other:
    def find_spec(name, path=None, target=None):
        if name == "torch" and VERSION == "no torch":
            raise ImportError("no torch here")
        if name != "torch.version":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def changed(module):
            execute(module)
            module.cuda = VERSION
        spec.loader.exec_module = changed
        return spec
sys.meta_path.insert(0, Other)
"""


@dataclass
class StandIns:
    """Scripts in the place of programs; a part of a command that is in `refused` makes the compilers fail."""

    folder: Path

    def script(self, name: str, text: str) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    def compiler(self, refused: str = "nothing at all", name: str = "c++") -> str:
        """Compiles nothing: an empty object for every source. Links, and answers questions, as the real one."""
        real = shutil.which("c++")
        if real is None:
            pytest.skip("there is no C++ compiler here")
        return self.script(
            name,
            f"""echo "$*" >> "{self.folder}/commands"
case "$* " in
  *"{refused}"*) echo "error: refused" >&2; exit 1 ;;
  *" -fsyntax-only "*) text=$(cat); case "$text" in *"{refused}"*) exit 1 ;; *) exit 0 ;; esac ;;
  *" -c "*) while [ $# -gt 0 ]; do [ "$1" = -o ] && object=$2; shift; done
    echo | "{real}" -x c++ -fPIC -c -o "$object" -; exit ;;
esac
exec "{real}" "$@\"""",
        )

    def toolkit(self, version: str, refused: str = "nothing at all") -> str:
        """A folder for CUDA_HOME."""
        self.compiler(refused, "cuda/bin/objects")
        said = f"Cuda compilation tools, release {version}, V{version}.0"
        self.script(
            "cuda/bin/nvcc", f'[ "$1" = --version ] && {{ echo "{said}"; exit; }}\nexec "$(dirname "$0")/objects" "$@"'
        )
        for name, text in (("include/cuda_runtime.h", ""), ("lib64/libcudart_static.a", "!<arch>\n")):
            (self.folder / "cuda" / name).parent.mkdir(exist_ok=True)
            (self.folder / "cuda" / name).write_text(text)
        return str(self.folder / "cuda")

    def torch(self, cuda: str | None) -> str:
        """A folder for PYTHONPATH, under which torch is built for this CUDA version."""
        folder = self.folder / "torch"
        folder.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(f"VERSION = {cuda!r}\n{OTHER_TORCH}")
        return str(folder)

    @property
    def commands(self) -> str:
        return (self.folder / "commands").read_text()


@pytest.fixture
def stand_ins(tmp_path) -> StandIns:
    return StandIns(tmp_path / "stand-ins")


@pytest.fixture(scope="session")
def works(once):
    """Imports bdfast from a folder, in an environment that has none: an editable one would lend its extension."""
    environment = once("environment", virtual_environment)

    def check(folder: Path, python: Path = environment / "bin" / "python") -> None:
        command = [python, "-c", WORKS, str(folder)]
        ran = subprocess.run(command, cwd=environment, env=clean_environment(), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr

    return check


@pytest.fixture
def without_kernels(tmp_path, works):
    """Checks a build without native kernels: it ended well, said one line with all of these parts, and works."""

    def check(built, *parts: str) -> None:
        assert built.returncode == 0, built.output[-4000:]
        assert built.binaries == []
        assert built.wheel.name.endswith("-py3-none-any.whl")
        (line,) = built.lines
        for part in ("built without the native kernels", *parts, REBUILD):
            assert part in line
        unpacked = tmp_path / "unpacked"
        shutil.unpack_archive(built.wheel, unpacked, "zip")
        works(unpacked)

    return check


def without_cuda(built, *parts: str) -> None:
    """Checks a build of the CPU half alone, which said so in one line."""
    assert built.returncode == 0, built.output[-4000:]
    assert len(built.binaries) == 1
    (line,) = built.lines
    for part in ("built without the CUDA kernels", *parts, f"BDFAST_CUDA=1 {REBUILD}"):
        assert part in line


def refused(built, *parts: str) -> None:
    """Checks a build that could not do what BDFAST_CUDA demanded."""
    assert built.returncode != 0
    assert built.wheel is None
    (line,) = built.lines
    for part in parts:
        assert part in line


def test_no_compiler(build, tree, tmp_path, without_kernels):
    (tmp_path / "nothing").mkdir()
    built = build(tree, PATH=str(tmp_path / "nothing"), CC=None, CXX=None)
    without_kernels(built, "missing: a C++ compiler.", "apt-get install g++")


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_variable_that_names_no_program(build, tree, without_kernels, variable):
    built = build(tree, **{variable: "no-such-compiler"})
    without_kernels(built, f"{variable} is 'no-such-compiler', which is no program", f"unset {variable}")


def test_no_headers_of_python(build, tree, stand_ins, without_kernels):
    built = build(tree, CXX=stand_ins.compiler(refused="Python.h"))
    without_kernels(built, "missing: Python.h", "apt-get install python3.")


def test_build_that_fails_leaves_no_binary(build, tree, stand_ins, without_kernels):
    built = build(tree, CXX=stand_ins.compiler(refused="module.c"))
    without_kernels(built, "their build failed", "`pip -v`")


def test_nothing_of_an_earlier_build_is_in_the_wheel(build, tree, stand_ins, without_kernels):
    first = build(tree, CXX=stand_ins.compiler())
    assert len(first.binaries) == 1
    assert first.lines == []
    (library,) = (tree / "build").glob("lib*")
    (library / "bdfast" / "module_of_yesterday.py").touch()
    second = build(tree, CXX="no-such-compiler")
    without_kernels(second)
    assert "bdfast/module_of_yesterday.py" not in second.names


def test_no_torch_yet(build, tree, stand_ins):
    built = build(tree, PYTHONPATH=stand_ins.torch("no torch"))
    assert built.returncode == 0, built.output[-4000:]
    assert built.binaries == []
    (line,) = built.lines
    assert "missing: torch" in line


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_nvcc_of_another_major_version(build, tree, stand_ins, choice):
    home, torch = stand_ins.toolkit("13.0"), stand_ins.torch(cuda="12.6")
    built = build(tree, CXX=stand_ins.compiler(), CUDA_HOME=home, PYTHONPATH=torch, BDFAST_CUDA=choice)
    check = without_cuda if choice == "auto" else refused
    check(built, "nvcc is 13.0, torch is built for 12.6", "apt-get install cuda-toolkit-12-6")


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_cuda_half_that_does_not_compile(build, tree, stand_ins, choice):
    home, torch = stand_ins.toolkit("12.8", refused="sharp_step.cu"), stand_ins.torch(cuda="12.6")
    built = build(tree, CXX=stand_ins.compiler(), CUDA_HOME=home, PYTHONPATH=torch, BDFAST_CUDA=choice)
    check = without_cuda if choice == "auto" else refused
    check(built, "their build failed")
    assert "compute_100" in stand_ins.commands


def test_nvcc_that_is_older_than_sm_100(build, tree, stand_ins):
    home, torch = stand_ins.toolkit("12.4"), stand_ins.torch(cuda="12.6")
    built = build(tree, CXX=stand_ins.compiler(), CUDA_HOME=home, PYTHONPATH=torch, BDFAST_CUDA="1")
    assert built.returncode == 0, built.output[-4000:]
    (line,) = built.lines
    assert "built for 8.0;9.0+PTX only" in line
    assert "code=compute_90" in stand_ins.commands
    assert "compute_100" not in stand_ins.commands


def test_torch_without_cuda_needs_no_version_of_nvcc(build, tree, stand_ins):
    """One binary serves every torch from 2.11 on, so the CUDA half is built all the same."""
    home, torch = stand_ins.toolkit("13.9"), stand_ins.torch(cuda=None)
    built = build(tree, CXX=stand_ins.compiler(), CUDA_HOME=home, PYTHONPATH=torch, BDFAST_CUDA="auto")
    assert built.returncode == 0, built.output[-4000:]
    assert built.lines == []
    assert "sharp_step.cu" in stand_ins.commands


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_no_toolkit(build, tree, stand_ins, tmp_path, choice):
    built = build(tree, CXX=stand_ins.compiler(), CUDA_HOME=str(tmp_path), BDFAST_CUDA=choice)
    check = without_cuda if choice == "auto" else refused
    check(built, f"missing: a CUDA toolkit (CUDA_HOME is '{tmp_path}', where there is none)", "unset CUDA_HOME")


def test_cuda_cannot_be_had_without_a_compiler(build, tree):
    refused(build(tree, CXX="no-such-compiler", BDFAST_CUDA="1"), "BDFAST_CUDA=1", "missing: a C++ compiler")


def test_choice_that_is_none(build, tree):
    built = build(tree, BDFAST_CUDA="yes")
    assert built.returncode != 0
    assert built.lines == ["bdfast: BDFAST_CUDA is 'yes', expected auto, 0 or 1; set one of these or unset it."]


def test_tree_that_cannot_be_written_to_at_a_path_with_a_space(build, tree, tmp_path):
    place = tmp_path / "a place"
    place.mkdir()
    if os.geteuid() == 0:
        # For root, only a file system can be read-only; the mount ends with the build.
        code = 'mount --bind "$0" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
        wrap = ["unshare", "--mount", "sh", "-c", code, str(tree), str(place)]
        if shutil.which("unshare") is None or subprocess.run([*wrap, "true"], capture_output=True).returncode:
            pytest.skip("root may not mount here, and writes wherever it wants")
    else:
        wrap = []
        place.rmdir()
        tree.rename(place)
        subprocess.run(["chmod", "-R", "a-w", str(place)], check=True)
    try:
        built = build(place, wrap=wrap)
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(place)], check=True)
    assert built.returncode == 0, built.output[-4000:]
    assert (built.lines, len(built.binaries)) == ([], 1) if shutil.which("c++") else built.lines


def test_pip_install_of_the_tree(tree, tmp_path, works):
    python = virtual_environment(tmp_path / "environment")
    done = pip_install(python, tree, CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    works(tmp_path / "environment", python)


def test_editable_installation_keeps_no_older_binary(tree, tmp_path, works):
    """It would hide that the sources do not compile any more."""
    older = tree / "bdfast" / "_C.abi3.so"
    older.touch()
    python = virtual_environment(tmp_path / "environment")
    done = pip_install(python, "--editable", tree, CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not older.exists()
    works(tree, python)
