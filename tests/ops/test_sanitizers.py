"""The native kernels again, built with AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  (before bdfast: the message of a missing torch is clearer)

from bdfast.ops.backends import backends

ROOT = Path(__file__).parents[2]
FILES = ("multi_tensor", "properties", "perturb", "sharp_step", "streaming", "aliasing", "neuron_norms")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
# setup.py's -O3 comes after CFLAGS and takes three times as long to compile with the checks.
COMPILER = """#!/bin/sh
exec g++ "$@" -O1
"""

# The sanitized library takes the place of the installed one before anything asks for it.
RUN = """
import importlib.util, sys, torch, bdfast.ops.schema
spec = importlib.util.spec_from_file_location("bdfast._C", sys.argv[1])
sys.modules["bdfast._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["bdfast._C"])
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def library(name: str) -> str | None:
    """Where the compiler keeps a runtime library."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if Path(path).is_absolute() else None


@pytest.mark.slow
def test_kernels_under_sanitizers(tmp_path):
    if not backends()["cpu"].available:
        pytest.skip(backends()["cpu"].reason)
    runtimes = [library("libasan.so"), library("libubsan.so")]
    if None in runtimes:
        pytest.skip("g++ has no AddressSanitizer here")
    compiler = tmp_path / "g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environment = {**os.environ, "CFLAGS": FLAGS, "LDFLAGS": FLAGS, "BDFAST_CUDA": "0", "CXX": str(compiler)}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path / "tmp", "--build-lib", tmp_path]
    built = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    (extension,) = (tmp_path / "bdfast").glob("_C*.so")
    environment |= {
        "LD_PRELOAD": " ".join(runtimes),
        # torch and Python leak on exit and throw across libraries, which is not ours to check.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    tests = [str(ROOT / "tests" / "ops" / f"test_{name}.py") for name in FILES]
    command = [sys.executable, "-c", RUN, str(extension), "-q", "-x", "-k", "cpu", "-p", "no:cacheprovider", *tests]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    assert " passed" in ran.stdout
