"""Finds the packages and builds the extension `bdfast._C`; everything else about bdfast stands in pyproject.toml.

BDFAST_CUDA=auto|0|1 decides about the CUDA half: auto builds it where it can be built, 0 never does, 1 fails when it
cannot. A visible GPU plays no part: build machines rarely have one.

bdfast works without the extension, on plain torch. So whatever cannot be built is left out, which one line says that
starts with "bdfast:"; only BDFAST_CUDA=1 makes it an error.
"""

import atexit
import contextlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
import textwrap
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

try:
    import torch
    from torch.utils import cpp_extension
except (ImportError, OSError):
    torch = None

ROOT = Path(__file__).resolve().parent
CHOICE = os.environ.get("BDFAST_CUDA") or "auto"
# Built against the stable ABI of this torch release: one binary runs on it and on every later one.
TARGET_TORCH = (2, 11)
TARGET_TORCH_MACRO = "0x020b000000000000"


def load(path):
    """A module of the package, without the package, which imports torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


needs = load(ROOT / "bdfast" / "cli" / "native_build.py")


def sources(folder):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.c*") if path.suffix != ".cuh")


def shape(home=None):
    """The arguments of the extension: with the CUDA half where the home of a toolkit is given."""
    files = ["csrc/module.c", *sources("csrc/cpu")]
    link = ["-s"]
    if home:
        files += sources("csrc/cuda")
        # Static, so that the same binary loads under a torch without CUDA.
        link += [f"-L{home}/lib64", f"-L{home}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    # Products and sums stay apart, so that aligned or not, the same numbers give the same bits.
    nvcc = ["-O3", "-std=c++17", "-fmad=false", "--threads=2"]
    define = [f"-DTORCH_TARGET_VERSION={TARGET_TORCH_MACRO}", "-DPy_LIMITED_API=0x030A0000"]
    # -fopenmp-simd vectorises the sums that are marked for it; -ffast-math would change every float of the process.
    cxx = [*define, "-O3", "-fopenmp-simd", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    return {"sources": files, "extra_compile_args": {"cxx": cxx, "nvcc": nvcc}, "extra_link_args": link}


def architectures(nvcc):
    """What to compile for: the newest one also as PTX, from which drivers compile for newer GPUs."""
    return "8.0;9.0;10.0+PTX" if nvcc >= (12, 8) else "8.0;9.0+PTX"


def torch_problems():
    if torch is None:
        return [needs.Missing("torch (not there when bdfast is built)", "pip install torch torchvision")]
    if torch.__version__ < TARGET_TORCH:
        return [needs.Missing(f"torch 2.11 or newer (it is {torch.__version__})", "pip install --upgrade torch")]
    return []


def cuda_problems():
    if torch.version.hip:
        return [needs.Missing("a torch for NVIDIA GPUs (it is built for ROCm)", "pip install --force-reinstall torch")]
    return needs.for_cuda(torch.version.cuda)


def left_out(part, problems=(), failure=""):
    """What to say of kernels that are left out: why, and how to get them. An error where they were demanded."""
    missing = " and ".join(problem.what for problem in problems)
    why = f"missing: {missing}" if missing else f"their build failed ({failure}; `pip -v` shows all that it printed)"
    again = needs.REBUILD if part == "native" else f"BDFAST_CUDA=1 {needs.REBUILD}"
    mend = " && ".join([*(problem.mend for problem in problems), again])
    if CHOICE == "1":
        sys.exit(f"bdfast: BDFAST_CUDA=1, but there can be no {part} kernels; {why}. To get them: {mend}")
    return f"built without the {part} kernels; {why}. To get them: {mend}"


class CleanBuild(build):
    def run(self):
        # What an earlier build left here would go into the wheel.
        shutil.rmtree(Path(self.build_lib, "bdfast"), ignore_errors=True)
        super().run()


class BuildNative(cpp_extension.BuildExtension if torch else build_ext):
    """Builds as much of the extension as can be built here, and says what is left out."""

    def run(self):
        self.remove_binary()
        built, line = self.build_what_can_be()
        if line:
            print(f"bdfast: {line}", flush=True)
        if not built:
            # The wheel has nothing native, so it is one for every platform.
            self.extensions = self.distribution.ext_modules = []
            if wheel := self.distribution.command_obj.get("bdist_wheel"):
                wheel.root_is_pure = True

    def build_what_can_be(self):
        """Whether there is an extension now, and what to say of it, if anything."""
        if problems := torch_problems() or needs.for_native():
            return False, left_out("native", problems)
        built, line = (False, "") if CHOICE == "0" else self.build_with_cuda()
        if built:
            return True, line
        failure = self.try_to_build(shape())
        return (False, left_out("native", failure=failure)) if failure else (True, line)

    def build_with_cuda(self):
        if problems := cuda_problems():
            return False, left_out("CUDA", problems)
        home = needs.cuda_home()
        cpp_extension.CUDA_HOME = str(home)
        chosen = architectures(needs.nvcc_version(home))
        older = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", chosen) == chosen and "10.0" not in chosen
        if failure := self.try_to_build(shape(home)):
            return False, left_out("CUDA", failure=failure)
        mend = f"apt-get install cuda-toolkit-12-8 && BDFAST_CUDA=1 {needs.REBUILD}"
        return True, f"built for {chosen} only, as nvcc is older than 12.8. To get all: {mend}" if older else ""

    def try_to_build(self, arguments):
        """Build with these arguments; returns why it failed, and then leaves nothing of it."""
        before = dict(vars(self))
        vars(self.extensions[0]).update(arguments)
        try:
            super().run()
        except Exception as error:
            vars(self).update(before)
            self.remove_binary()
            return textwrap.shorten(str(error), 160) or type(error).__name__
        return ""

    def remove_binary(self):
        # In an editable installation the binary lies in the source tree: an old one would hide that none was built.
        for folder in [Path(self.build_lib), *([ROOT] if self.inplace else [])]:
            for binary in (folder / "bdfast").glob("_C*.so"):
                with contextlib.suppress(OSError):
                    binary.unlink()


def extension():
    if torch is None:
        return Extension("bdfast._C", ["csrc/module.c"], py_limited_api=True)
    return cpp_extension.CppExtension("bdfast._C", py_limited_api=True, **shape())


def options():
    # Free-threaded Python has no stable ABI, and setuptools refuses the tag.
    chosen = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}}
    written = [ROOT, ROOT / "build", ROOT / "bdfast.egg-info"]
    if not all(os.access(path, os.W_OK) for path in written if path.exists()):
        elsewhere = tempfile.mkdtemp(prefix="bdfast-build-")
        atexit.register(shutil.rmtree, elsewhere, ignore_errors=True)
        chosen |= {"build": {"build_base": elsewhere}, "egg_info": {"egg_base": elsewhere}}
    return chosen


if CHOICE not in ("auto", "0", "1"):
    sys.exit(f"bdfast: BDFAST_CUDA is {CHOICE!r}, expected auto, 0 or 1; set one of these or unset it.")
setup(
    # Found, as a list here would be out of date with the next package. `kernels/` is installed under one name only.
    packages=[*find_packages(str(ROOT), include=["bdfast", "bdfast.*"]), "bdfast.kernels"],
    package_dir={"bdfast.kernels": "kernels"},
    package_data={"": ["py.typed", "*.pyi", "*.j2"], "bdfast.detectors": ["calibrations/*.json"]},
    include_package_data=False,
    ext_modules=[extension()],
    cmdclass={"build": CleanBuild, "build_ext": BuildNative},
    options=options(),
)
