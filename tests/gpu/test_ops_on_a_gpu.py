"""The tests of the ops once more, on a GPU: every list is carried there and back."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdfast import ops
from bdfast.ops.backends import backends

OPS = Path(__file__).parents[1] / "ops"
FILES = ("neuron_norms", "kth_largest_change", "zero_changed", "scale_neurons", "perturb", "sharp_step", "multi_tensor")
# Too few selected sub-weights give NaN on a GPU, as finding out would keep it waiting.
LEFT_OUT = "not out_of_range and not nothing_selected"

RUN = """
import sys
import pytest, torch
from bdfast.ops import backends
from bdfast.ops.schema import SCHEMAS

def carried(kernel):
    def to_gpu(x):
        if isinstance(x, (list, tuple)):
            return [to_gpu(y) for y in x]
        return x.to("cuda") if isinstance(x, torch.Tensor) else x

    def run(*args):
        there = [to_gpu(x) for x in args]
        result = kernel(*there)
        for here, moved in zip(args, there):
            for a, b in zip(here, moved) if isinstance(here, (list, tuple)) else ():
                a.copy_(b)
        return None if result is None else result.cpu()

    return run

kernels = {op: carried(kernel) for op, kernel in backends._load(sys.argv[1])[0].items()}
backends._LOADERS["cpu"] = lambda: kernels
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.fixture(autouse=True)
def gpu_is_there(skip_without):
    skip_without("gpu", None if torch.cuda.is_available() else "torch finds none")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_the_tests_of_the_ops(name, skip_without):
    skip_without(name, backends()[name].reason)
    files = [str(OPS / f"test_{file}.py") for file in FILES]
    command = [sys.executable, "-c", RUN, name, "-q", "-x", "-k", f"cpu and {LEFT_OUT}", *files]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]


@pytest.mark.gpu
def test_a_step_is_captured_in_a_graph(skip_without):
    skip_without("cuda", backends()["cuda"].reason)
    shapes = [(64, 27), (64,), (10, 640)]
    params, grads, buffers = ([torch.randn(shape, device="cuda") for shape in shapes] for _ in range(3))
    saved = [torch.empty_like(param) for param in params]
    start = [[x.clone() for x in tensors] for tensors in (params, buffers)]

    def step() -> None:
        ops.perturb_(params, grads, saved, rho=0.05)
        ops.sharp_step_(params, saved, grads, buffers, lr=0.1, momentum=0.9)

    def start_again() -> None:
        for tensors, kept in zip((params, buffers), start, strict=True):
            torch._foreach_copy_(tensors, kept)

    step()
    expected = [x.clone() for x in params]
    start_again()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    start_again()
    graph.replay()
    assert all(map(torch.equal, params, expected))
