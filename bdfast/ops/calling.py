"""How the public functions of the ops reach a kernel."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bdfast.ops import aliasing, backends, checks, dispatcher
from bdfast.ops.lists import write

_REFUSED = "cannot be used as they are"
"""What the kernels say of arguments that they do not take, before they write anything; see csrc/lists.h."""


@torch.no_grad()
def run(
    op: str,
    lists: Mapping[str, list[Tensor] | None],
    *args: Any,
    check: Callable[[checks.Lists], None],
    empty: Callable[[], Any],
    written: Sequence[str] = (),
) -> Any:
    """Run `op` on lists of tensors, without autograd.

    A native kernel checks everything that it relies on before it writes, in a fraction of the time that Python needs.
    So it is tried first. Where it refuses, and where there is none, `check` finds what is wrong and explains it. Where
    nothing is wrong, tensors that no kernel can read are replaced by copies.

    Args:
        op: Its name.
        lists: By the names of the arguments, in the order of the schema; None for one that was left out.
        *args: The other arguments.
        check: Called with the lists that were passed. Raises the error that explains a wrong argument.
        empty: The result for lists without a tensor.
        written: Names of the lists that the op writes to.
    """
    passed = {name: tensors for name, tensors in lists.items() if tensors is not None}
    first = next(iter(passed.values()))
    # Kernels get an empty list for one that was left out, so an empty list that was passed needs the checks.
    kernel = backends.native(op, first[0]) if all(passed.values()) else None
    failure: Exception | None = None
    if kernel is not None:
        try:
            result = kernel(*[tensors or [] for tensors in lists.values()], *args)
        except (RuntimeError, TypeError, ValueError) as error:
            failure = error  # explained below, or raised again
        else:
            dispatcher.count_versions(passed[name] for name in written if name in passed)
            return result
    check(passed)
    if not first:
        return empty()
    copied = checks.make_readable(passed, written)
    refused = copied or isinstance(failure, NotImplementedError) or _REFUSED in str(failure)
    if failure and written and not refused:
        raise failure  # it may have come after the kernel had written, and a step must not be taken twice
    args = tuple(aliasing.as_readable(x.contiguous()) if isinstance(x, Tensor) else x for x in args)
    result = getattr(torch.ops.bdfast, op)(*[passed.get(name, []) for name in lists], *args)
    write(copied)
    return result
