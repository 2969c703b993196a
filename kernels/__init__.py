"""Triton kernels, one file per op. Installed as `bdfast.kernels` and imported only when they are needed.

One launch processes all tensors of a list. It reads their addresses from a table (`tables.py`), and each program
processes one piece (`pieces.py`). The host never waits for the device.
"""

from collections.abc import Callable
from typing import Any

if __name__ != "bdfast.kernels":
    raise ImportError("This folder is installed as `bdfast.kernels`; import it under that name.")

from bdfast.kernels import kth_largest_change_kernel as _kth_largest_change
from bdfast.kernels import neuron_norms_kernel as _neuron_norms
from bdfast.kernels import perturb_kernel as _perturb
from bdfast.kernels import scale_neurons_kernel as _scale_neurons
from bdfast.kernels import sharp_step_kernel as _sharp_step
from bdfast.kernels import sums as _sums
from bdfast.kernels import zero_changed_kernel as _zero_changed

# With the names and arguments of `bdfast.ops.reference`. The arguments were checked before and have dense rows.
KERNELS: dict[str, Callable[..., Any]] = {
    "neuron_norms": _neuron_norms.neuron_norms,
    "kth_largest_change": _kth_largest_change.kth_largest_change,
    "zero_changed_": _zero_changed.zero_changed_,
    "scale_neurons_": _scale_neurons.scale_neurons_,
    "perturb_": _perturb.perturb_,
    "sharp_step_": _sharp_step.sharp_step_,
}

# Everything that can be compiled without a GPU, by the name of the file.
SIGNATURES = {
    module.__name__.rpartition(".")[2]: module.SIGNATURES
    for module in (
        _neuron_norms,
        _kth_largest_change,
        _zero_changed,
        _scale_neurons,
        _perturb,
        _sharp_step,
        _sums,
    )
}
