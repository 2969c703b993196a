"""The tests of the ops once more, on a GPU: every list is carried there and back."""

import pytest
import torch

from bdfast import ops
from bdfast.ops.backends import backends

KERNELS = """
import sys
import torch
from bdfast.ops import backends

def carried(kernel):
    def run(*args):
        moved_before = {}  # what stands in two lists is one tensor there too

        def to_gpu(x):
            if isinstance(x, (list, tuple)):
                return [to_gpu(y) for y in x]
            if not isinstance(x, torch.Tensor):
                return x
            return moved_before.setdefault(id(x), x.to("cuda"))

        there = [to_gpu(x) for x in args]
        result = kernel(*there)
        for here, moved in zip(args, there):
            for a, b in zip(here, moved) if isinstance(here, (list, tuple)) else ():
                a.copy_(b)
        return None if result is None else result.cpu()

    return run

kernels = {op: carried(kernel) for op, kernel in backends._load(sys.argv[1])[0].items()}
"""


@pytest.fixture(autouse=True)
def gpu_is_there(skip_without):
    skip_without("gpu", None if torch.cuda.is_available() else "torch finds none")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_the_tests_of_the_ops(name, skip_without, run_op_tests):
    skip_without(name, backends()[name].reason)
    run_op_tests(KERNELS, name)


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
