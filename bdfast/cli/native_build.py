"""What a build of the native kernels takes, and what of it is missing here.

`setup.py` loads this file by its path, before anything is installed: it may import the standard library only.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

# How an installation gets its kernels once everything they take is there; to be run in the source tree.
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


class Missing(NamedTuple):
    """Something that is not here, and the command that mends it."""

    what: str
    mend: str


def for_native() -> list[Missing]:
    """What the CPU kernels lack, in the order in which to mend it; empty where they can be built."""
    return [problem for problem in (stable_abi(), compiler(), python_headers()) if problem]


def for_cuda(torch_cuda: str | None) -> list[Missing]:
    """What the CUDA kernels lack beside that, for a torch of this CUDA version (None: torch has no CUDA)."""
    problem = toolkit(torch_cuda)
    return [problem] if problem else []


def stable_abi() -> Missing | None:
    """The stable ABI of Python, which the extension is built against."""
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    return Missing("a Python with the stable ABI (free-threaded Python has none)", "python3 -m venv .venv")


def compiler_command() -> list[str]:
    """The C++ compiler that torch runs, with the options that CXX gives it."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def compiler() -> Missing | None:
    """A C++ compiler, and none that CC or CXX only names."""
    for name in ("CXX", "CC"):
        command = shlex.split(os.environ.get(name, ""))
        if command and shutil.which(command[0]) is None:
            install = "" if shutil.which("c++") else " && apt-get install g++"
            return Missing(f"a C++ compiler ({name} is {command[0]!r}, which is no program)", f"unset {name}{install}")
    command = compiler_command()
    if shutil.which(command[0]) is None:
        return Missing("a C++ compiler", "apt-get install g++")
    if not _compiles("#include <vector>\n"):
        return Missing(
            f"a C++ compiler that works ({command[0]} cannot compile an empty program)", "apt-get install g++"
        )
    return None


def python_headers() -> Missing | None:
    """Python.h, where this Python or the compiler looks for it."""
    if compiler():
        found = any((Path(folder) / "Python.h").is_file() for folder in _include_folders())
    else:
        found = _compiles("#include <Python.h>\n")
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return None if found else Missing("Python.h, the headers of Python", f"apt-get install {package}")


def ninja() -> Missing | None:
    """Ninja, without which a build takes longer but works."""
    return (
        None if shutil.which("ninja") else Missing("ninja (optional, the build is faster with it)", "pip install ninja")
    )


def cuda_home() -> Path | None:
    """The folder of the CUDA toolkit: where CUDA_HOME or CUDA_PATH says, or where toolkits usually lie."""
    if named := _named_home():
        homes = [Path(named[1])]
    else:
        homes = [Path("/usr/local/cuda")]
        if nvcc := shutil.which("nvcc"):
            homes += [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]]
    wanted = ("bin/nvcc", "include/cuda_runtime.h")
    return next((home for home in homes if all((home / file).is_file() for file in wanted)), None)


def nvcc_version(home: Path) -> tuple[int, int] | None:
    """What `nvcc --version` says, or None where it does not run."""
    try:
        said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else None


def toolkit(torch_cuda: str | None) -> Missing | None:
    """A CUDA toolkit with an nvcc of torch's major version; torch refuses to build with another."""
    package = f"cuda-toolkit-{torch_cuda.replace('.', '-')}" if torch_cuda else "cuda-toolkit"
    mend = f"apt-get install {package}"  # of NVIDIA's package source
    home = cuda_home()
    if home is None:
        if named := _named_home():
            return Missing(f"a CUDA toolkit ({named[0]} is {named[1]!r}, where there is none)", f"unset {named[0]}")
        return Missing("a CUDA toolkit (nvcc)", mend)
    version = nvcc_version(home)
    if version is None:
        return Missing(f"a CUDA toolkit that works ({home / 'bin' / 'nvcc'} tells no version)", mend)
    if torch_cuda and version[0] != int(torch_cuda.split(".")[0]):
        what = f"a CUDA toolkit {torch_cuda} (nvcc is {version[0]}.{version[1]}, torch is built for {torch_cuda})"
        return Missing(what, f"{mend} && export CUDA_HOME=/usr/local/cuda-{torch_cuda}")
    return None


def _named_home() -> tuple[str, str] | None:
    """The variable that names the toolkit's folder, and the folder."""
    return next(((name, os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), None)


def _include_folders() -> list[str]:
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude")))


def _compiles(source: str) -> bool:
    """Whether the compiler takes this source, with the options that a build would give it."""
    options = shlex.split(f"{os.environ.get('CFLAGS', '')} {os.environ.get('CPPFLAGS', '')}")
    folders = [f"-I{folder}" for folder in _include_folders()]
    command = [*compiler_command(), *options, *folders, "-fsyntax-only", "-x", "c++", "-"]
    try:
        return subprocess.run(command, input=source, capture_output=True, text=True, timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False
