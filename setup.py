"""Builds the extension `bdfast._C`; everything else about the package stands in pyproject.toml.

BDFAST_CUDA=auto|0|1 decides about the CUDA half: auto builds it when a toolkit is found and csrc/cuda has
sources, 0 never does, 1 fails when it cannot. A visible GPU plays no part: build machines rarely have one.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
# Built against the stable ABI of this torch release: one binary runs on it and on every later one.
TARGET_TORCH = "0x020d000000000000"
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def sources(folder):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.c*") if path.suffix != ".cuh")


def cuda_home():
    candidates = (os.environ.get("CUDA_HOME"), "/usr/local/cuda", cpp_extension.CUDA_HOME)
    for home in filter(None, candidates):
        if (Path(home) / "include" / "cuda_runtime.h").exists():
            return home
    return None


def with_cuda():
    choice = os.environ.get("BDFAST_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"BDFAST_CUDA is {choice!r}, expected auto, 0 or 1.")
    possible = bool(sources("csrc/cuda")) and cuda_home() is not None
    if choice == "1" and not possible:
        sys.exit("BDFAST_CUDA=1, but no CUDA toolkit or no CUDA sources were found; set CUDA_HOME or BDFAST_CUDA=auto.")
    return choice != "0" and possible


def extensions():
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        print("bdfast: no C++ compiler found; installing without the native kernels (see `bdfast doctor`).")
        return []
    files = ["csrc/module.c", *sources("csrc/cpu")]
    link = ["-s"]
    if with_cuda():
        home = cuda_home()
        cpp_extension.CUDA_HOME = home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
        files += sources("csrc/cuda")
        # Static, so that the same binary loads under a torch without CUDA.
        link += [f"-L{home}/lib64", f"-L{home}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    # Products and sums stay apart, so that aligned or not, the same numbers give the same bits.
    nvcc = ["-O3", "-std=c++17", "-fmad=false", "--threads=2"]
    define = [f"-DTORCH_TARGET_VERSION={TARGET_TORCH}", "-DPy_LIMITED_API=0x030A0000"]
    # -fopenmp-simd vectorises the sums that are marked for it; -ffast-math would change every float of the process.
    cxx = [*define, "-O3", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    return [
        cpp_extension.CppExtension(
            "bdfast._C",
            files,
            extra_compile_args={"cxx": cxx, "nvcc": nvcc},
            extra_link_args=link,
            py_limited_api=True,
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
