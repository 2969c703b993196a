"""Every op on its own, on the parameters of real networks: a loop as in published code, the best of `torch._foreach`,
`torch.compile` of the loop, and bdfast."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from bdfast import ops
from bench import lists
from bench.compare import COPYING, OURS, READING, Way, assert_close, same_results

SHARE = 0.9  # of the neurons that are selected
TOP = 0.7  # of their sub-weights
RHO, LR, MOMENTUM, ALPHA, EPS = 0.05, 0.01, 0.9, 0.7, 1e-12


@dataclass
class Case:
    """What is compared.

    Attributes:
        ways: Name -> the way.
        compiled: What torch.compile makes of a way.
        bytes_each: That a parameter costs at the least.
        memory: READING or COPYING.
        written: What the ways write to; the others return their result.
    """

    ways: dict[str, Way]
    compiled: Way
    bytes_each: float
    memory: str
    written: list[Tensor] = field(default_factory=list)


def compiled(function: Callable, *args) -> Way:
    ready = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda: ready(*args)


def changes(case: str) -> tuple[list[Tensor], list[Tensor]]:
    refs = lists.random_list(case, 0)
    return [ref + step for ref, step in zip(refs, lists.random_list(case, 1, size=0.01), strict=True)], refs


def selected(xs: list[Tensor]) -> tuple[Tensor, list[Tensor], int]:
    """A mask over all neurons, its part for each tensor in its shape, and the number of selected sub-weights."""
    neurons = torch.rand(sum(len(x) for x in xs), generator=torch.Generator().manual_seed(2)) < SHARE
    neurons = neurons.to(xs[0].device)
    masks = per_tensor(neurons, xs)
    return neurons, masks, sum(int(mask.sum()) * (x.numel() // len(x)) for mask, x in zip(masks, xs, strict=True))


def per_tensor(vector: Tensor, xs: list[Tensor]) -> list[Tensor]:
    parts = vector.split([len(x) for x in xs])
    return [part.view(-1, *[1] * (x.ndim - 1)) for part, x in zip(parts, xs, strict=True)]


def neuron_norms(case: str) -> Case:
    xs, refs = changes(case)

    def loop(xs, refs):
        return torch.cat([(x - ref).abs().view(len(x), -1).sum(1) for x, ref in zip(xs, refs, strict=True)])

    def foreach():
        """There is no norm of rows, so that the last step is a loop."""
        steps = torch._foreach_sub(xs, refs)
        torch._foreach_abs_(steps)
        return torch.cat([step.view(len(step), -1).sum(1) for step in steps])

    ways = {OURS: lambda: ops.neuron_norms(xs, refs), "loop": lambda: loop(xs, refs), "foreach": foreach}
    return Case(ways, compiled(loop, xs, refs), 8, READING)


def kth_largest_change(case: str) -> Case:
    xs, refs = changes(case)
    neurons, masks, pool = selected(xs)
    q = int(TOP * pool)
    total = sum(x.numel() for x in xs)

    def loop():
        every = zip(xs, refs, masks, strict=True)
        changed = [(x - ref).abs().view(len(x), -1)[mask.view(-1)].view(-1) for x, ref, mask in every]
        return torch.cat(changed).kthvalue(pool - q + 1).values

    def foreach():
        steps = torch._foreach_sub(xs, refs)
        torch._foreach_abs_(steps)
        changed = [step.view(len(step), -1)[mask.view(-1)].view(-1) for step, mask in zip(steps, masks, strict=True)]
        return torch.cat(changed).kthvalue(pool - q + 1).values

    def fixed_shapes(xs, refs, masks):
        """A graph cannot select, so that what is not selected goes to the end."""
        every = zip(xs, refs, masks, strict=True)
        changed = torch.cat([torch.where(mask, (x - ref).abs(), -1).view(-1) for x, ref, mask in every])
        return changed.kthvalue(total - q + 1).values

    ways = {OURS: lambda: ops.kth_largest_change(xs, refs, neurons, q), "loop": loop, "foreach": foreach}
    return Case(ways, compiled(fixed_shapes, xs, refs, masks), 8 * SHARE, READING)


def zero_changed_(case: str) -> Case:
    xs, refs = changes(case)
    params = lists.copies(refs)
    neurons, masks, _ = selected(xs)
    tau = torch.tensor(0.01, device=xs[0].device)

    def loop(params, xs, refs, masks, tau):
        for param, x, ref, mask in zip(params, xs, refs, masks, strict=True):
            param.masked_fill_(((x - ref).abs() >= tau) & mask, 0)

    def foreach():
        steps = torch._foreach_sub(xs, refs)
        torch._foreach_abs_(steps)
        for param, step, mask in zip(params, steps, masks, strict=True):
            param.masked_fill_((step >= tau) & mask, 0)

    ways = {
        OURS: lambda: ops.zero_changed_(params, xs, refs, neurons, tau),
        "loop": lambda: loop(params, xs, refs, masks, tau),
        "foreach": foreach,
    }
    return Case(ways, compiled(loop, params, xs, refs, masks, tau), 16 * SHARE, COPYING, params)


def scale_neurons_(case: str) -> Case:
    params = lists.random_list(case, 0)
    # Factors of -1, so that no run makes the weights smaller than the one before.
    scale = -torch.ones(sum(len(param) for param in params), device=params[0].device)
    factors = per_tensor(scale, params)

    def loop(params, factors):
        for param, factor in zip(params, factors, strict=True):
            param.mul_(factor)

    ways = {
        OURS: lambda: ops.scale_neurons_(params, scale),
        "loop": lambda: loop(params, factors),
        "foreach": lambda: torch._foreach_mul_(params, factors),
    }
    return Case(ways, compiled(loop, params, factors), 8, COPYING, params)


def perturb_(case: str) -> Case:
    params, dirs = lists.random_list(case, 0), lists.random_list(case, 1, size=0.01)
    saved = lists.copies(params)

    def loop(params, dirs, saved):
        norm = torch.stack([direction.norm() for direction in dirs]).norm()
        for param, direction, keep in zip(params, dirs, saved, strict=True):
            keep.copy_(param)
            param.add_(direction * (RHO / (norm + EPS)))

    def foreach():
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(dirs)))
        torch._foreach_copy_(saved, params)
        torch._foreach_add_(params, dirs, alpha=float(RHO / (norm + EPS)))

    ways = {
        OURS: lambda: ops.perturb_(params, dirs, saved, rho=RHO),
        "loop": lambda: loop(params, dirs, saved),
        "foreach": foreach,
    }
    return Case(ways, compiled(loop, params, dirs, saved), 20, COPYING, [*params, *saved])


def sharp_step_(case: str) -> Case:
    params, saved = lists.random_list(case, 0), lists.random_list(case, 1)
    grads, first, buffers = (lists.random_list(case, seed, size=0.01) for seed in (2, 3, 4))

    def loop(params, saved, grads, first, buffers):
        for param, keep, g2, g1, buffer in zip(params, saved, grads, first, buffers, strict=True):
            buffer.mul_(MOMENTUM).add_((1 - ALPHA) * g1 + ALPHA * g2)
            param.copy_(keep).add_(buffer, alpha=-LR)

    def foreach():
        torch._foreach_mul_(buffers, MOMENTUM)
        torch._foreach_add_(buffers, first, alpha=1 - ALPHA)
        torch._foreach_add_(buffers, grads, alpha=ALPHA)
        torch._foreach_copy_(params, saved)
        torch._foreach_add_(params, buffers, alpha=-LR)

    def ours():
        ops.sharp_step_(params, saved, grads, buffers, lr=LR, momentum=MOMENTUM, first_grads=first, alpha=ALPHA)

    ways = {OURS: ours, "loop": lambda: loop(params, saved, grads, first, buffers), "foreach": foreach}
    return Case(ways, compiled(loop, params, saved, grads, first, buffers), 24, COPYING, [*params, *buffers])


OPS = (neuron_norms, kth_largest_change, zero_changed_, scale_neurons_, perturb_, sharp_step_)


@pytest.mark.parametrize("case", [*lists.NETWORKS, lists.PATHOLOGICAL])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_op(compare, op, case):
    made = op(case)

    def gate(ways: dict[str, Way]) -> None:
        if made.written:
            assert_close(same_results(ways, made.written))
        else:
            assert_close({name: [way()] for name, way in ways.items()})

    elements = lists.elements(case)
    compare(
        op.__name__,
        case,
        made.ways,
        compiled={"torch.compile": made.compiled},
        moved=round(made.bytes_each * elements),
        memory=made.memory,
        elements=elements,
        gate=gate,
    )
