"""The CUDA half of the extension is built and loads where there is no GPU."""

import subprocess
import sys

import pytest
import torch

from bdfast.ops.backends import backends
from bdfast.ops.schema import SCHEMAS


@pytest.fixture(autouse=True)
def cuda_half(skip_without):
    backends()
    built = torch._C._dispatch_has_kernel_for_dispatch_key("bdfast_cuda::neuron_norms", "CUDA")
    skip_without("cuda-build", None if built else "no toolkit was found when it was built, or BDFAST_CUDA was 0")


@pytest.mark.parametrize("op", SCHEMAS)
def test_every_op_is_there(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bdfast_cuda::{op}", "CUDA")


def test_importing_it_does_not_start_cuda():
    code = "import bdfast, torch; bdfast.backends(); assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_library_of_cuda_is_needed():
    """Or the binary would not load under a torch without CUDA."""
    import bdfast._C

    try:
        listed = subprocess.run(["readelf", "-d", bdfast._C.__file__], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("readelf is not installed")
    needed = [line for line in listed.stdout.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "cuda" in line]
