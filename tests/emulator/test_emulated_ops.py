"""The tests of the ops once more, with the CUDA kernels in the place of the native ones."""

import subprocess
import sys

from emulated import HERE, ORDERS, compile_with_emulator

OPS = HERE.parent / "ops"
FILES = ("neuron_norms", "kth_largest_change", "zero_changed", "scale_neurons", "perturb", "sharp_step")
LISTS = ("multi_tensor", "streaming")
# Python finds out that too few sub-weights are selected by asking the device, which a GPU is not kept waiting for.
LEFT_OUT = "not out_of_range and not nothing_selected"

RUN = """
import sys
from pathlib import Path
import pytest, torch
sys.path.insert(0, sys.argv[1])
from emulated import Emulated
from bdfast.ops import backends
emulated = Emulated(Path(sys.argv[2]))
emulated.set(sys.argv[3])
kernels = emulated.kernels()
backends._LOADERS["cpu"] = lambda: kernels
sys.exit(pytest.main(sys.argv[4:]))
"""


def test_the_tests_of_the_ops(tmp_path):
    compile_with_emulator(HERE / "harness.cpp", tmp_path / "emulated.so")
    files = [str(OPS / f"test_{name}.py") for name in (*FILES, *LISTS)]
    options = ["-q", "-x", "-k", f"cpu and {LEFT_OUT}", "-p", "no:cacheprovider", *files]
    command = [sys.executable, "-c", RUN, str(HERE), str(tmp_path / "emulated.so"), ORDERS[2], *options]
    ran = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    assert " passed" in ran.stdout
