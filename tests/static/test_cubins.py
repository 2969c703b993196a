"""Every CUDA kernel compiles for every architecture to what it is meant to be."""

import pytest
from cubins import ARCHITECTURES, all_kernels, missing

# Kernels that read a handful of numbers, and none of the elements.
SMALL = ("read_result", "norms_of_groups", "norms_of_long_rows", "add_up")
MOST_REGISTERS = 64  # half of the warps that an SM can hold
WRITING = ("scale_rows", "zero_rows", "step")


# All of them use what one fixture compiles.
pytestmark = pytest.mark.xdist_group("cubins")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, skip_without):
    skip_without("cuda-build", missing())
    return all_kernels(tmp_path_factory.mktemp("cubins"))


@pytest.fixture(scope="module")
def large(kernels):
    return [kernel for kernel in kernels if not kernel.name.startswith(SMALL)]


def described(kernels):
    return [f"{kernel.architecture} {kernel.name}" for kernel in kernels]


@pytest.mark.slow
def test_all_are_there(kernels):
    by_architecture = {name: {k.name for k in kernels if k.architecture == name} for name in ARCHITECTURES}
    assert len(set(map(frozenset, by_architecture.values()))) == 1
    # norms: 3 norms, with and without ref, 3 dtypes; steps: 3 modes or 8 sets of lists, 3 dtypes.
    counts = {"norms_of_rows": 18, "sum_squares": 9, "step<": 9 + 24, "count_digit": 3, "zero_rows": 3, "scale_rows": 3}
    for start, count in counts.items():
        assert sum(name.startswith(start) for name in by_architecture["sm_90"]) == count


@pytest.mark.slow
def test_nothing_is_kept_in_local_memory(kernels):
    assert described(k for k in kernels if k.stack or k.count("LDL") or k.count("STL")) == []


@pytest.mark.slow
def test_registers_leave_room(kernels):
    assert described(k for k in kernels if k.registers > MOST_REGISTERS) == []


@pytest.mark.slow
def test_accesses_are_128_bits_wide(large):
    assert described(k for k in large if not k.count("LDG", ".128")) == []
    writing = [k for k in large if k.name.startswith(WRITING)]
    assert described(k for k in writing if not k.count("STG", ".128")) == []


@pytest.mark.slow
def test_no_float_atomics(kernels):
    """They add in any order; integers do not mind."""
    atomics = {name for k in kernels for name in k.instructions if name.startswith(("ATOM", "RED"))}
    assert [name for name in atomics if ".F32" in name or ".F64" in name or ".F16" in name] == []
