"""What the compiler made of the CUDA kernels: registers, spills, wide accesses, occupancy. Needs nvcc and no GPU."""

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
THREADS = 256  # kThreads of csrc/cuda/portable.cuh
REGISTERS_OF_SM, WARPS_OF_SM, WARP = 65536, 64, 32  # the same on all three


@dataclass
class Kernel:
    """One instance of a kernel for one architecture."""

    source: str
    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    instructions: Counter = field(default_factory=Counter)

    @property
    def occupancy(self) -> float:
        """The share of an SM's warps that can be there at a time, by registers: shared memory is not short here."""
        of_warp = -(-self.registers * WARP // 256) * 256
        blocks = REGISTERS_OF_SM // of_warp // (THREADS // WARP)
        return min(1.0, blocks * (THREADS // WARP) / WARPS_OF_SM)

    def count(self, start: str, holding: str = "") -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(start) and holding in name)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return shutil.which("cuobjdump", path=str(folder))


def missing() -> str | None:
    """Why nothing can be compiled or read here; None where it can."""
    if nvcc() is None:
        return "there is no nvcc"
    return None if cuobjdump() else "there is no cuobjdump, neither of the toolkit nor of Triton"


def compiled(source: Path, architecture: str, folder: Path) -> list[Kernel]:
    """All kernels of a file."""
    cubin = folder / f"{source.stem}-{architecture}.cubin"
    command = [nvcc(), "-cubin", f"-arch={architecture}", "-O3", "-std=c++17", "-fmad=false", "-o", cubin, source]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    read = [cuobjdump(), "-sass", "-res-usage", cubin]
    listing = subprocess.run([str(part) for part in read], check=True, capture_output=True, text=True).stdout
    listing = subprocess.run(["c++filt"], input=listing, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, Kernel] = {}
    current = None
    for line in listing.splitlines():
        if match := re.match(r"\s*Function\s*:?\s*(.*?):?\s*$", line):
            name = shortened(match[1])
            current = kernels.setdefault(name, Kernel(source.stem, name, architecture))
        elif current and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)):
            current.registers, current.stack, current.shared = map(int, match.groups())
        elif current and (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", line)):
            current.instructions[match[1]] += 1
    return list(kernels.values())


def shortened(name: str) -> str:
    """`step<Lists<true, true, false>, Float32>` of a name with all its namespaces and arguments."""
    name = re.sub(r"bdfast::cuda::|\(anonymous namespace\)::|^void ", "", name)
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:i]
    return name


def all_kernels(folder: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> list[Kernel]:
    return [
        kernel
        for source in sorted(CUDA.glob("*.cu"))
        for architecture in architectures
        for kernel in compiled(source, architecture, folder)
    ]
