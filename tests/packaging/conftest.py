import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from building import Built, Installed, clean_environment, copy_tree, locked, pip_install, pip_wheel, virtual_environment


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder once for all workers of pytest-xdist: `once(name, make)` returns it after `make(folder)`."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / "packaging" / name, shared / "packaging" / f"{name}.done"
        folder.mkdir(parents=True, exist_ok=True)
        with locked(shared / "packaging" / f"{name}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the checkout that a test may write into."""
    return copy_tree(tmp_path / "tree")


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Built]:
    """`pip wheel` of a source tree."""

    def run(source: Path, **options) -> Built:
        folder = tmp_path / "wheel"
        shutil.rmtree(folder, ignore_errors=True)
        return pip_wheel(source, folder, **options)

    return run


@pytest.fixture(scope="session")
def sdist(once: Callable) -> Path:
    """The sdist, made where there is no compiler."""

    def make(folder: Path) -> None:
        tree = copy_tree(folder / "tree")
        code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
        (folder / "nothing").mkdir()
        env = {**clean_environment(), "PATH": str(folder / "nothing")}
        command = [sys.executable, "-c", code, folder]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

    (archive,) = once("sdist", make).glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def built(once: Callable, sdist: Path) -> Built:
    """The wheel, built from the sdist; BDFAST_PACKAGE_CUDA says whether with the CUDA half."""

    def make(folder: Path) -> None:
        done = pip_wheel(sdist, folder, BDFAST_CUDA=os.environ.get("BDFAST_PACKAGE_CUDA", "0"))
        assert done.returncode == 0, done.output[-6000:]
        (folder / "output").write_text(done.output)

    folder = once("wheel", make)
    return Built(0, (folder / "output").read_text(), next(folder.glob("*.whl")))


@pytest.fixture(scope="session")
def installed(once: Callable, built: Built) -> Installed:
    """bdfast installed from the wheel that was built from the sdist."""

    def make(folder: Path) -> None:
        python = virtual_environment(folder / "environment")
        done = pip_install(python, built.wheel)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "elsewhere").mkdir()

    folder = once("installed", make)
    scripts = folder / "environment" / "bin"
    return Installed(python=scripts / "python", bin=scripts, folder=folder / "elsewhere")
