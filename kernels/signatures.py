"""Signatures to compile the kernels for ahead of time, without a GPU."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import triton.language as tl


@dataclass(frozen=True)
class Signature:
    """One specialisation of a kernel.

    Attributes:
        kernel: The `triton.jit` function.
        arguments: The type of every argument by its name, in Triton's spelling; "constexpr" for constants.
        constants: Their values.
        reads_lists: Whether it reads the tensors of a list, so that it has to have wide loads.
    """

    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    reads_lists: bool = True

    @property
    def name(self) -> str:
        """The kernel and its constants."""
        return "-".join([self.kernel.__name__, *map(str, self.constants.values())])


def signatures(kernel: Any, arguments: Mapping[str, str], **choices: Iterable[Any]) -> list[Signature]:
    """One signature for every combination of these constants, including DTYPE."""
    names = list(choices)
    types = {**arguments, **dict.fromkeys(names, "constexpr")}
    return [
        Signature(kernel, types, dict(zip(names, values, strict=True)), "DTYPE" in names)
        for values in product(*choices.values())
    ]


ALL_DTYPES = (tl.float32, tl.bfloat16, tl.float16)
TABLE = {"entries": "*i64", "pieces": "*i64"}
