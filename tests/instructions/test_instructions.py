"""How many instructions the inner loops take for an element, counted by valgrind: a slowdown shows on any machine.

The budgets are counts of this code plus a tenth. A change that needs more has to say why, and raise them.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("driver.cpp")
ELEMENTS = 1 << 16

NORMS = "std::vector<float> out(rows); Block block{nullptr, a.data(), b.data(), rows, columns, 0}; "
WIDE = NORMS + "measure_rows(Norm::kSum, dtype, block, 0, rows, out.data())"
NARROW = NORMS + "measure_narrow_rows(Norm::kSum, dtype, block, 0, rows, out.data())"
SINGLE = (
    "Block block{nullptr, a.data(), b.data(), rows, columns, 0}; "
    "measure_single_column(Norm::%s, dtype, block, 0, rows, static_cast<float*>(c.data()))"
)
SCALE = (
    "std::vector<float> factors(rows, 0.5f); Block block{a.data(), nullptr, nullptr, rows, columns, 0}; "
    "scale_piece(dtype, block, 0, kElements, factors.data())"
)
ZERO = (
    "Block block{a.data(), b.data(), c.data(), rows, columns, 0}; sink = zero_piece(dtype, block, 0, kElements, 0.3f)"
)
KEYS = (
    "Block block{nullptr, a.data(), b.data(), rows, columns, 0}; uint32_t* kept = static_cast<uint32_t*>(c.data()); "
    "int64_t above = 0; keep_inside(dtype, block, 0, kElements, {0x3e000000, 0x3e100000}, kept, above); sink = above"
)
SQUARES = "sink = squares_of_piece(Mode::kSam, dtype, a.data(), b.data(), 0, kElements)"
PERTURB = "step_piece(Mode::kSam, dtype, a.data(), b.data(), c.data(), true, 0, kElements, 0.1f)"
STEP = (
    "std::array<void*, kLists> entry{a.data(), b.data(), c.data(), d.data(), e.data(), nullptr}; "
    "Options options{0.1f, 0.9f, 1.0f, 1e-4f, 0.7f, 1.0f}; "
    "sink = step_piece(dtype, entry, 0, kElements, true, Momentum::kPlain, options)"
)

# Kernel, call, columns of a row, whether in bfloat16, most instructions for 1,000 elements.
CASES = {
    "neuron_norms, wide rows": ("neuron_norms", WIDE, 1024, 0, 1141),
    "neuron_norms, bfloat16": ("neuron_norms", WIDE, 1024, 1, 1682),
    "neuron_norms, rows of 16": ("neuron_norms", NARROW, 16, 0, 5884),
    "neuron_norms, rows of 1": ("neuron_norms", SINGLE % "kSumOfSquares", 1, 0, 2773),
    "neuron_norms, rows of 1, bfloat16": ("neuron_norms", SINGLE % "kSum", 1, 1, 1604),
    "scale_neurons_": ("scale_neurons", SCALE, 1024, 0, 758),
    "scale_neurons_, bfloat16": ("scale_neurons", SCALE, 1024, 1, 2690),
    "zero_changed_": ("zero_changed", ZERO, 1024, 0, 2177),
    "kth_largest_change": ("kth_largest_change", KEYS, 1024, 0, 2577),
    "perturb_, norm": ("perturb", SQUARES, 1024, 0, 622),
    "perturb_, step": ("perturb", PERTURB, 1024, 0, 2307),
    "perturb_, step, bfloat16": ("perturb", PERTURB, 1024, 1, 4072),
    "perturb_, step, float16": ("perturb", PERTURB, 1024, 2, 14527),
    "neuron_norms, float16": ("neuron_norms", WIDE, 1024, 2, 6072),
    "sharp_step_": ("sharp_step", STEP, 1024, 0, 3609),
    "sharp_step_, bfloat16": ("sharp_step", STEP, 1024, 1, 8182),
}


# All of them use what one fixture compiles.
pytestmark = pytest.mark.xdist_group("instructions")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """kernel, call -> the program that runs it; each is compiled once."""
    folder = tmp_path_factory.mktemp("instructions")
    programs: dict[tuple[str, str], Path] = {}

    def built(kernel: str, call: str) -> Path:
        if (kernel, call) not in programs:
            program = folder / f"{kernel}-{len(programs)}"
            command = ["g++", "-std=c++17", "-O3", "-fopenmp-simd", "-w", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
            command += [f"-I{path}" for path in include_paths()]
            command += [f'-DKERNEL="{ROOT / "csrc" / "cpu" / kernel}.cpp"', f"-DCALL={call}", "-o", program, DRIVER]
            # Nothing of torch is called, so nothing of it needs to be there.
            subprocess.run([*command, "-Wl,--unresolved-symbols=ignore-all"], check=True, capture_output=True)
            programs[kernel, call] = program
        return programs[kernel, call]

    return built


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_instructions(build, tmp_path, case):
    if shutil.which("valgrind") is None or shutil.which("g++") is None:
        pytest.skip("valgrind and g++ are needed to count instructions")
    kernel, call, columns, half, budget = CASES[case]
    command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=measured"]
    command += [f"--callgrind-out-file={tmp_path / 'out'}", build(kernel, call), str(columns), str(half)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    count = int(re.search(r"Collected : (\d+)", ran.stderr)[1])
    assert 0 < count <= budget * ELEMENTS / 1000, f"{case}: {1000 * count / ELEMENTS:.0f} instructions per 1,000"
