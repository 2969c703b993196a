"""Checks for NaN and infinite gradients, made before the weights are updated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from bdfast.ops.lists import grouped, kind, with_rows
from bdfast.ops.neuron_norms_op import neuron_norms


def check_finite_gradients(named_params: Iterable[tuple[str, Tensor]]) -> None:
    """Raise before a step that would write NaN or infinity into the weights.

    Reads every gradient once and waits for the device.

    Raises:
        FloatingPointError: A gradient is not finite. The message names the first such parameter.
    """
    named = [(name, parameter.grad) for name, parameter in named_params if parameter.grad is not None]
    check_finite([gradient for _, gradient in named], lambda index: named[index][0])


@torch.no_grad()
def check_finite(tensors: Sequence[Tensor], name: Callable[[int], str], what: str = "gradient") -> None:
    """The same for any tensors, which the message calls `what`; `name(index)` returns the name for the error."""
    tensors = [x if x.layout is torch.strided else _values(x) for x in tensors]
    for places in grouped((kind(x), place) for place, x in enumerate(tensors)).values():
        # One sum per neuron: the fused op reaches the memory bandwidth, `_foreach_norm` does not.
        sums = neuron_norms([with_rows(tensors[place]) for place in places], ord=1)
        if bool(sums.isfinite().all()):
            continue
        for place in places:
            # The sum of large finite numbers overflows too.
            if not bool(tensors[place].isfinite().all()):
                raise FloatingPointError(
                    f"{name(place)}: expected a finite {what}, got NaN or infinity; the weights are untouched. Lower "
                    "the learning rate, pass amp=False, or look for NaN in images and weights."
                )


def _values(x: Tensor) -> Tensor:
    """What a sparse tensor holds."""
    return x.coalesce().values() if x.layout is torch.sparse_coo else x.to_dense()
