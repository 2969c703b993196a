"""The schemas and fake implementations of all ops, declared only here.

`torch.ops.bdfast.<op>` runs the implementation that `dispatcher.py` selects. Every native backend has its own namespace
with the same schemas (`torch.ops.bdfast_cpu.<op>`), so that all backends stay callable. Native code only registers
implementations. The public functions check the arguments.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SCHEMAS = {
    "neuron_norms": "(Tensor[] xs, Tensor[] refs, float ord) -> Tensor",
    "kth_largest_change": "(Tensor[] xs, Tensor[] refs, Tensor neurons, int q) -> Tensor",
    "zero_changed_": ("(Tensor(a!)[] params, Tensor[] xs, Tensor[] refs, Tensor neurons, Tensor tau) -> Tensor"),
    "scale_neurons_": "(Tensor(a!)[] params, Tensor scale) -> ()",
    "perturb_": (  # `kind` is the public `mode`, a name that torch's tracing uses for itself
        "(Tensor(a!)[] params, Tensor[] dirs, Tensor(b!)[] saved, Tensor? norm, float rho, str kind, str scope, "
        "float eps) -> Tensor"
    ),
    "sharp_step_": (
        "(Tensor(a!)[] params, Tensor[] saved, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] first_grads, "
        "Tensor[] references, float lr, float momentum, float dampening, bool nesterov, float weight_decay, "
        "float alpha, bool maximize) -> Tensor"
    ),
}
NATIVE_NAMESPACES = ("bdfast_cpu", "bdfast_cuda")


def _neuron_norms_fake(xs: Sequence[Tensor], refs: Sequence[Tensor], ord: float) -> Tensor:
    return xs[0].new_empty(sum(x.shape[0] for x in xs), dtype=torch.float32)


def _kth_largest_change_fake(xs: Sequence[Tensor], refs: Sequence[Tensor], neurons: Tensor, q: int) -> Tensor:
    return neurons.new_empty((), dtype=torch.float32)


def _zero_changed_fake(
    params: Sequence[Tensor], xs: Sequence[Tensor], refs: Sequence[Tensor], neurons: Tensor, tau: Tensor
) -> Tensor:
    return neurons.new_empty((), dtype=torch.int64)


def _scale_neurons_fake(params: Sequence[Tensor], scale: Tensor) -> None:
    return None


def _perturb_fake(
    params: Sequence[Tensor],
    dirs: Sequence[Tensor],
    saved: Sequence[Tensor],
    norm: Tensor | None,
    rho: float,
    kind: str,
    scope: str,
    eps: float,
) -> Tensor:
    return params[0].new_empty((len(params),) if scope == "tensor" else (), dtype=torch.float32)


def _sharp_step_fake(params: Sequence[Tensor], *args: object) -> Tensor:
    return params[0].new_empty((), dtype=torch.float32)


FAKES: dict[str, Callable[..., Tensor | None]] = {
    "neuron_norms": _neuron_norms_fake,
    "kth_largest_change": _kth_largest_change_fake,
    "zero_changed_": _zero_changed_fake,
    "scale_neurons_": _scale_neurons_fake,
    "perturb_": _perturb_fake,
    "sharp_step_": _sharp_step_fake,
}


def _native_fake(op: str) -> Callable[..., Tensor | None]:
    def fake(tensors: list[Tensor], *args: object) -> Tensor | None:
        # The dispatcher also calls this with real tensors if one of them is on meta.
        if type(tensors[0]) in (Tensor, torch.nn.Parameter) and not tensors[0].is_meta:
            raise RuntimeError(f"{op}: some tensors are on meta, others are not; call the functions in bdfast.ops")
        return FAKES[op](tensors, *args)

    return fake


# The strides are checked before the call, so a compiler must not change them afterwards.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

for _op, _schema in SCHEMAS.items():
    for _namespace in ("bdfast", *NATIVE_NAMESPACES):
        torch.library.define(f"{_namespace}::{_op}", _schema, tags=_TAGS)
        _fake = FAKES[_op] if _namespace == "bdfast" else _native_fake(_op)
        torch.library.register_fake(f"{_namespace}::{_op}", _fake)
