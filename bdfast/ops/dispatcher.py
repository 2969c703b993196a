"""`torch.ops.bdfast.<op>`: runs the implementation that `backends.select` chooses."""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from bdfast.ops import backends
from bdfast.ops.schema import SCHEMAS


def count_versions(lists: Iterable[Sequence[Tensor]]) -> None:
    """Increment the version counters of tensors written in place, so that autograd detects outdated graphs."""
    torch.autograd.graph.increment_version(list(chain.from_iterable(lists)))  # ignores inference tensors


def _dispatcher(op: str) -> Callable[..., Tensor | None]:
    def run(tensors: list[Tensor], *args: Any) -> Tensor | None:
        result = backends.select(op, tensors[0])(tensors, *args)
        return result.float() if result is not None and result.is_floating_point() else result

    written = [i for i, argument in enumerate(SCHEMAS[op].split(",")) if "!" in argument]

    def run_in_place(*args: Any) -> Tensor | None:
        result = run(*args)
        count_versions(args[i] for i in written)
        return result

    return run_in_place if written else run


for _op in SCHEMAS:
    torch.library.impl(f"bdfast::{_op}", "default", _dispatcher(_op))
