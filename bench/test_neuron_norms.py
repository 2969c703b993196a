"""The weight change of every neuron: the loop of the published code, torch's multi-tensor form, torch.compile, ours."""

import pytest
import torch
from torch import Tensor

from bdfast import ops
from bench import lists
from bench.compare import OURS, assert_close, read_two


def loop(xs: list[Tensor], refs: list[Tensor]) -> list[Tensor]:
    """As published, less its text file: one tensor after another."""
    return [
        (x - ref).abs().flatten(1).sum(1) if x.ndim > 1 else (x - ref).abs() for x, ref in zip(xs, refs, strict=True)
    ]


def foreach(xs: list[Tensor], refs: list[Tensor]) -> list[Tensor]:
    """The best that torch._foreach has: no norm of rows, so that the last step is a loop."""
    changes = torch._foreach_sub(xs, refs)
    torch._foreach_abs_(changes)
    return [change.flatten(1).sum(1) if change.ndim > 1 else change for change in changes]


@pytest.mark.parametrize("case", [*lists.NETWORKS, lists.PATHOLOGICAL])
def test_neuron_norms(compare, case):
    refs = lists.random_list(case, 0)
    xs = [ref + change for ref, change in zip(refs, lists.random_list(case, 1, size=0.01), strict=True)]
    compiled = torch.compile(lambda a, b: torch.cat(loop(a, b)), fullgraph=True, dynamic=False)
    elements = lists.elements(case)

    def gate(ways):
        assert_close({name: [way()] for name, way in ways.items()})

    compare(
        "neuron_norms",
        case,
        {
            OURS: lambda: ops.neuron_norms(xs, refs),
            "loop": lambda: torch.cat(loop(xs, refs)),
            "foreach": lambda: torch.cat(foreach(xs, refs)),
        },
        compiled={"torch.compile": lambda: compiled(xs, refs)},
        moved=8 * elements,
        memory=read_two(elements, torch.float32),
        gate=gate,
    )
