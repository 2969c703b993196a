"""The Triton kernels compiled for three generations of GPUs, and what their machine code shows without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
OPS = ("neuron_norms", "kth_largest_change", "zero_changed", "scale_neurons", "perturb", "sharp_step")
FILES = (*(f"{op}_kernel" for op in OPS), "sums")
ARCHITECTURES = (80, 90, 100)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compiled Triton kernels")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Facts about every kernel for every architecture."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("file", FILES)
def test_machine_code(compiled, file):
    kernels = [kernel for kernel in compiled if kernel["file"] == file]
    assert {kernel["architecture"] for kernel in kernels} == set(ARCHITECTURES)
    for kernel in kernels:
        where = f"{kernel['name']}, sm_{kernel['architecture']}: {kernel}"
        assert kernel["registers"] <= 128, where
        assert kernel["local"] == 0, where
        assert kernel["stack"] == 0, where
        # Subnormal numbers count, and products are rounded before they are added, whatever the specialisation.
        assert kernel["flushing"] == 0, where
        assert kernel["float_atomics"] == 0, where
        if kernel["reads_lists"]:
            assert kernel["wide_loads"] > 0, where
            # Lists that are not aligned take another branch, which the hints of the first must not reach.
            assert kernel["single_loads"] > 0, where


def test_every_op_is_there_in_every_dtype(compiled):
    for file in set(FILES) - {"sums"}:
        dtypes = {kernel["dtype"] for kernel in compiled if kernel["file"] == file}
        assert dtypes - {""} == {"fp32", "bf16", "fp16"}
    assert {kernel["file"] for kernel in compiled} == set(FILES)
