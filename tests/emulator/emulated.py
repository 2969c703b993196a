"""The CUDA kernels, run on the CPU: builds them together with the emulator, and gives each op the signature that the
reference has."""

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("sam", "asam", "path")
MOST_LISTS = 6
ORDERS = ("forward", "reverse", "random")
ADDRESS_SANITIZER = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1")  # -O1 compiles faster
THREAD_SANITIZER = ("-fsanitize=thread",)


def missing() -> str | None:
    """Why the emulator cannot be built here; None where it can."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "the emulator switches stacks by hand, on x86-64 Linux only"
    return None if shutil.which("g++") else "g++ is needed to compile the CUDA kernels for the CPU"


def compile_with_emulator(program: Path, output: Path, *flags: str, tsan: bool = False, kernels: bool = True) -> None:
    """Compile a file of this folder, the kernels and the emulator, which itself never has the sanitizers of `flags`."""
    include = [f"-I{path}" for path in include_paths()]
    common = ["g++", "-std=c++17", "-g1", "-w", "-fPIC", "-O2", "-DTORCH_TARGET_VERSION=0x020b000000000000", *include]
    sources = [program, *(sorted((CSRC / "cuda").glob("*.cu")) if kernels else [])]
    objects = [output.with_name(f"{output.name}-{source.stem}.o") for source in (HERE / "emulator.cpp", *sources)]
    commands: list[list[object]] = [[*common, *(["-DBDFAST_TSAN"] if tsan else []), "-c", HERE / "emulator.cpp"]]
    commands += [[*common, *flags, "-include", HERE / "emulator.h", "-x", "c++", "-c", source] for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [[*command, "-o", made] for command, made in zip(commands, objects, strict=True)]))
    shared = ["-shared"] if output.suffix == ".so" else []
    run(["g++", *flags, *shared, *objects, "-o", output, "-pthread", "-ldl"])


def run(command: Sequence[object]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


class HostTensor(ctypes.Structure):
    """As in csrc/cuda/plan.h."""

    _fields_ = (("data", ctypes.c_void_p * MOST_LISTS), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64))


class SgdOptions(ctypes.Structure):
    """As in csrc/cuda/launch.h."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("lr", "momentum", "damped", "weight_decay", "alpha", "sign")),
        ("nesterov", ctypes.c_bool),
    )


def host_list(*lists: Sequence[Tensor]) -> tuple[ctypes.Array, int, int]:
    """The lists as the kernels take them, how many tensors there are, and their dtype."""
    first = lists[0]
    made = (HostTensor * len(first))()
    for i, tensor in enumerate(first):
        rows = tensor.shape[0]
        made[i].rows, made[i].columns = rows, tensor.numel() // rows if rows else 0
        for place, tensors in enumerate(lists):
            made[i].data[place] = tensors[i].data_ptr() if tensors else None
    return made, len(first), DTYPES.index(first[0].dtype)


class Emulated:
    """The kernels in a library of `compile_with_emulator`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_error.restype = ctypes.c_char_p
        for name in ("take_launches", "uploads", "allocated"):
            getattr(self.library, f"emulator_{name}").restype = ctypes.c_int64

    def set(self, order: str = "forward", seed: int = 1, os_threads: int = 1) -> None:
        self.library.emulator_set(ORDERS.index(order), ctypes.c_uint64(seed), os_threads)

    def take_launches(self) -> int:
        return self.library.emulator_take_launches()

    def call(self, name: str, lists: tuple[ctypes.Array, int, int], *args: object) -> None:
        tensors, count, dtype = lists
        if getattr(self.library, f"emulated_{name}")(tensors, ctypes.c_int64(count), dtype, *args):
            raise RuntimeError(self.library.emulator_error().decode())

    def neuron_norms(self, xs, refs, ord):
        norms = torch.empty(sum(x.shape[0] for x in xs))
        self.call("neuron_norms", host_list(xs, refs), ctypes.c_double(ord), pointer(norms))
        return norms

    def kth_largest_change(self, xs, refs, neurons, q):
        change = torch.empty(())
        self.call("kth_largest_change", host_list(xs, refs), pointer(neurons), ctypes.c_int64(q), pointer(change))
        return change

    def zero_changed_(self, params, xs, refs, neurons, tau):
        count = torch.empty((), dtype=torch.int64)
        self.call("zero_changed", host_list(params, xs, refs), pointer(neurons), pointer(tau), pointer(count))
        return count

    def scale_neurons_(self, params, scale):
        self.call("scale_neurons", host_list(params), pointer(scale))

    def perturb_(self, params, dirs, saved, norm, rho, kind, scope, eps):
        norms = torch.empty((len(params),) if scope == "tensor" else ())
        options = (MODES.index(kind), int(scope == "tensor"), ctypes.c_double(rho), ctypes.c_double(eps))
        self.call("perturb", host_list(params, dirs, saved), *options, pointer(norm), pointer(norms))
        return norms

    def sharp_step_(self, params, saved, grads, momentum_buffers, first_grads, references, *options):
        lr, momentum, dampening, nesterov, weight_decay, alpha, maximize = options
        sgd = SgdOptions(lr, momentum, 1 - dampening, weight_decay, alpha, -1 if maximize else 1, nesterov)
        squared_distance = torch.empty(())
        lists = host_list(params, saved, grads, momentum_buffers, first_grads, references)
        self.call("sharp_step", lists, ctypes.byref(sgd), pointer(squared_distance))
        return squared_distance

    def kernels(self) -> dict[str, Callable]:
        """By the names of the ops, as a backend has them."""
        from bdfast.ops.schema import SCHEMAS

        return {op: getattr(self, op) for op in SCHEMAS}


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
