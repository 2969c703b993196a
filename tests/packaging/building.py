"""Building and installing bdfast from a copy of the checkout, offline. Nothing here writes into the checkout."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What decides about a build, and must not come from whoever runs the tests.
DECIDING = ("BDFAST_CUDA", "BDFAST_BACKEND", "CFLAGS", "CPPFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH")
PIP = ["-m", "pip", "--isolated", "--disable-pip-version-check"]
OFFLINE = ["--no-index", "--no-deps", "--no-build-isolation"]


@dataclass
class Built:
    """How a build ended: all that it printed, and the wheel if there is one."""

    returncode: int
    output: str
    wheel: Path | None

    @property
    def lines(self) -> list[str]:
        """The lines that speak of what was left out."""
        return [line.strip() for line in self.output.splitlines() if line.strip().startswith("bdfast:")]

    @property
    def names(self) -> set[str]:
        assert self.wheel is not None, self.output[-4000:]
        return set(zipfile.ZipFile(self.wheel).namelist())

    @property
    def binaries(self) -> list[str]:
        return [name for name in self.names if ".so" in name]


@dataclass
class Installed:
    """A virtual environment with bdfast from a wheel, and an empty folder to work in, away from the checkout.

    Everything else comes from the environment that runs the tests.
    """

    python: Path
    bin: Path
    folder: Path

    def run(
        self, args: Sequence[str | Path], cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program, one of the environment first, and return how it ended; `python` is the environment's."""
        env = {**clean_environment(), "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", **environment}
        program = self.bin / args[0]
        command = [program if program.is_file() else args[0], *args[1:]]
        return subprocess.run(
            [str(part) for part in command], cwd=cwd or self.folder, env=env, capture_output=True, text=True
        )

    def output(self, *args: str | Path) -> str:
        """What a program prints that must succeed."""
        done = self.run(args)
        assert done.returncode == 0, (args, done.stdout[-4000:], done.stderr[-4000:])
        return done.stdout


def clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in DECIDING}
    # Ninja of the environment that runs the tests, also where that one is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "MAX_JOBS": "2"}


def listed(*folders: str) -> list[str]:
    """The files of the checkout, committed or not, without those that git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{ROOT} is not a git checkout: {done.stderr.strip()}")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def copy_tree(folder: Path) -> Path:
    for name in listed():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def pip_wheel(source: Path, folder: Path, *, wrap: Sequence[str] = (), **environment: str | None) -> Built:
    """Run `pip wheel` offline; a variable that is None is taken out of its environment."""
    env = {**clean_environment(), "BDFAST_CUDA": "0", **environment}
    command = [*wrap, sys.executable, *PIP, "wheel", "--verbose", *OFFLINE, "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(
        command,
        env={name: value for name, value in env.items() if value is not None},
        cwd=source if source.is_dir() else source.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Built(done.returncode, done.stdout, next(folder.glob("*.whl"), None))


def virtual_environment(folder: Path) -> Path:
    """A fresh environment with the packages of this one but not its editable bdfast; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    # Such a folder's own .pth files are not read, so an editable installation in it is not active.
    (own / "packages_of_the_tests.pth").write_text("\n".join(packages) + "\n")
    return python


def pip_install(python: Path, *args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # --ignore-installed keeps pip's hands off a bdfast among the packages of the tests.
    command = [python, *PIP, "install", "--verbose", "--ignore-installed", *OFFLINE, *args]
    env = {**clean_environment(), "BDFAST_CUDA": "0", **environment}
    return subprocess.run([str(part) for part in command], env=env, cwd=python.parent, capture_output=True, text=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
