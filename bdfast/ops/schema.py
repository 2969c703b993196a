"""The schemas and fakes of all ops, the only place that declares them.

`torch.ops.bdfast.<op>` asks `backends.select` which implementation runs. Every native backend has a namespace
of its own with the same schemas (`torch.ops.bdfast_cpu.<op>`), so that all stay callable side by side. Native
code only implements. Arguments are checked by the public functions, not here.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bdfast.ops import backends

SCHEMAS = {
    "neuron_norms": "(Tensor[] xs, Tensor[] refs, float ord) -> Tensor",
    "kth_largest_change": "(Tensor[] xs, Tensor[] refs, Tensor neurons, int q) -> Tensor",
    "zero_changed_": ("(Tensor(a!)[] params, Tensor[] xs, Tensor[] refs, Tensor neurons, Tensor tau) -> Tensor"),
    "scale_neurons_": "(Tensor(a!)[] params, Tensor scale) -> ()",
}
NATIVE_NAMESPACES = ("bdfast_cpu",)


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


FAKES: dict[str, Callable[..., Tensor | None]] = {
    "neuron_norms": _neuron_norms_fake,
    "kth_largest_change": _kth_largest_change_fake,
    "zero_changed_": _zero_changed_fake,
    "scale_neurons_": _scale_neurons_fake,
}


def _dispatcher(op: str) -> Callable[..., Tensor | None]:
    def run(tensors: list[Tensor], *args: object) -> Tensor | None:
        result = backends.select(op, tensors[0])(tensors, *args)
        return result.float() if result is not None and result.is_floating_point() else result

    def run_in_place(tensors: list[Tensor], *args: object) -> Tensor | None:
        result = run(tensors, *args)
        # Below autograd nobody counts versions, and a stale graph would go unnoticed.
        torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])
        return result

    return run_in_place if op.endswith("_") else run


# The strides were checked before the call, and a compiler must not change them afterwards.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

for _op, _schema in SCHEMAS.items():
    for _namespace in ("bdfast", *NATIVE_NAMESPACES):
        torch.library.define(f"{_namespace}::{_op}", _schema, tags=_TAGS)
        torch.library.register_fake(f"{_namespace}::{_op}", FAKES[_op])
    torch.library.impl(f"bdfast::{_op}", "default", _dispatcher(_op))
