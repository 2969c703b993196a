"""Selects the implementation of an op, and records why a backend is not available.

The first backend of `ORDER` that is available and has the op is used. `use_backend` or the environment variable
BDFAST_BACKEND forces one. A backend is loaded once, when it is first needed; if that fails, the reason is kept.
"""

import contextlib
import difflib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdfast.ops import reference, schema

Kernel = Callable[..., Any]

ORDER = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
NAMES = tuple(dict.fromkeys(name for names in ORDER.values() for name in names))
ENVIRONMENT_VARIABLE = "BDFAST_BACKEND"

_forced: ContextVar[str | None] = ContextVar("bdfast_backend", default=None)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used; if not, why not and what to do."""

    available: bool
    reason: str


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot be used; the message says why."""


def _load_torch() -> dict[str, Kernel]:
    return {op: getattr(reference, op) for op in schema.SCHEMAS}


def _load_cpu() -> dict[str, Kernel]:
    _load_library()
    return {op: getattr(torch.ops.bdfast_cpu, op).default for op in schema.SCHEMAS}


def _load_cuda() -> dict[str, Kernel]:
    _load_library()
    if not torch._C._dispatch_has_kernel_for_dispatch_key("bdfast_cuda::neuron_norms", "CUDA"):
        raise BackendUnavailable(
            "this build has no CUDA kernels; `bdfast doctor` names what they need, then run "
            "`BDFAST_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .` in the source tree"
        )
    _require_gpu()
    return {op: getattr(torch.ops.bdfast_cuda, op).default for op in schema.SCHEMAS}


def _load_triton() -> dict[str, Kernel]:
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("Triton is not installed; it comes with the CUDA builds of torch")
    _require_gpu()
    if torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        raise BackendUnavailable("the kernels need an NVIDIA GPU of compute capability 8.0 or newer")
    try:
        kernels = importlib.import_module("bdfast.kernels")
    except ImportError as error:
        raise BackendUnavailable(f"the Triton kernels do not load ({error}); install another triton") from error
    return dict(kernels.KERNELS)


def _load_library() -> None:
    try:
        importlib.import_module("bdfast._C")
    except ImportError as error:
        raise BackendUnavailable(
            f"the native kernels do not load ({error}); `bdfast doctor` names what they need, then run "
            "`pip install --no-build-isolation --force-reinstall --no-deps .` in the source tree"
        ) from error


def _require_gpu() -> None:
    if not torch.cuda.is_available():
        raise BackendUnavailable("torch finds no GPU")


_LOADERS: dict[str, Callable[[], dict[str, Kernel]]] = {
    "torch": _load_torch,
    "cpu": _load_cpu,
    "cuda": _load_cuda,
    "triton": _load_triton,
}


@functools.cache
def _load(name: str) -> tuple[Mapping[str, Kernel], BackendStatus]:
    try:
        kernels = _LOADERS[name]()
    except BackendUnavailable as error:
        _log.info("Backend %s is not used: %s.", name, error)
        return {}, BackendStatus(False, str(error))
    _log.info("Backend %s is loaded.", name)
    return kernels, BackendStatus(True, "")


def backends() -> dict[str, BackendStatus]:
    """The state of every backend, by name."""
    return {name: _load(name)[1] for name in NAMES}


def _require(name: str, asked_by: str) -> None:
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)[0]
        raise ValueError(
            f"{asked_by}: expected one of the backends {', '.join(NAMES)}, got {name!r}; did you mean {nearest!r}?"
        )
    status = _load(name)[1]
    if not status.available:
        raise BackendUnavailable(f"{asked_by}: backend {name!r} is not available: {status.reason}.")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for all ops inside the `with` block of this thread; blocks may be nested.

    float64 tensors are computed by `torch` under every backend.

    Args:
        name: A key of `backends()`: "cpu", "cuda", "triton" or "torch".

    Raises:
        ValueError: There is no backend of this name, or (from an op inside) it does not serve the device.
        BackendUnavailable: It is not built or does not load. The message gives the reason.
    """
    _require(name, "use_backend")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _forced_name() -> str | None:
    name = _forced.get()
    if name is None and (name := os.environ.get(ENVIRONMENT_VARIABLE)):
        _require(name, ENVIRONMENT_VARIABLE)
    return name or None


def select(op: str, tensor: Tensor) -> Kernel:
    """The implementation of `op` for tensors of this one's device and dtype."""
    device = tensor.device.type
    candidates = ORDER.get(device, ("torch",))
    forced = _forced_name()
    if forced is not None:
        if forced not in candidates and forced != "torch":
            raise ValueError(
                f"{op}: expected one of the backends {', '.join(candidates)} for tensors on {device}, got {forced!r}; "
                "force another backend or move the tensors."
            )
        candidates = (forced,)
    if tensor.dtype == torch.float64:
        candidates = ("torch",)
    for name in candidates:
        if kernel := _load(name)[0].get(op):
            return kernel
    raise BackendUnavailable(
        f"{op}: backend {candidates[0]!r} is forced, but does not have this op; force another one."
    )


def native(op: str, tensor: object) -> Kernel | None:
    """The native implementation of `op` for tensors like this one; None if the PyTorch one is used.

    None also for fake tensors, subclasses and under a compiler, which need `torch.ops.bdfast`.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return None
    kernel = select(op, tensor)  # type: ignore[arg-type]
    return kernel if isinstance(kernel, torch._ops.OpOverload) else None
