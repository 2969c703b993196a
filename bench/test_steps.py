"""The part of a training step beside forward and backward: perturb, mix, update. TSBD, FT-SAM and PAM.

The gradients are given; between the two halves of a step a backward pass would write the second ones. The published
ways are plain transcriptions of their loops: a copy of the model, Python over the parameters, a tensor per operation.
"foreach" keeps its arguments and makes new tensors, as torch's optimizers do; "foreach in place" makes as few as it
can, keeps the place of the saved weights as bdfast does, and spends the gradients. "optimizer" is the class of
`bdfast.optim` around the ops of ours, which also looks whether the last gradient is finite.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bdfast import ops
from bdfast.optim import PAM, SAM, GradientNorm, SharpOptimizer
from bench import lists
from bench.compare import COPYING, OURS, assert_close, same_results

RHO, ALPHA, LR, MOMENTUM, DECAY, EPS = 0.05, 0.7, 0.01, 0.9, 5e-4, 1e-12
Lists = dict[str, list[Tensor]]


def fresh(case: str) -> Lists:
    kinds = {"params": 0.05, "first": 0.01, "second": 0.01, "buffers": 0.01, "end": 0.05}
    return {kind: lists.random_list(case, seed, size=size) for seed, (kind, size) in enumerate(kinds.items())}


def published_update(params: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], decay: float) -> None:
    """torch.optim.SGD, one tensor after another."""
    for param, gradient, buffer in zip(params, gradients, buffers, strict=True):
        if decay:
            gradient = gradient.add(param, alpha=decay)
        buffer.mul_(MOMENTUM).add_(gradient)
        param.add_(buffer, alpha=-LR)


def foreach_update(params: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], decay: float) -> None:
    if decay:
        gradients = torch._foreach_add(gradients, params, alpha=decay)
    torch._foreach_mul_(buffers, MOMENTUM)
    torch._foreach_add_(buffers, gradients)
    torch._foreach_add_(params, buffers, alpha=-LR)


def update_in_place(params: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], decay: float) -> None:
    if decay:
        torch._foreach_add_(gradients, params, alpha=decay)
    torch._foreach_mul_(buffers, MOMENTUM)
    torch._foreach_add_(buffers, gradients)
    torch._foreach_add_(params, buffers, alpha=-LR)


def tsbd_published(params, first, second, buffers, end) -> None:
    """Both passes on a deep copy; gradients cloned, mixed into a new list, and put back."""
    copy = [param.clone() for param in params]
    kept = [gradient.clone() for gradient in first]
    for param, gradient in zip(copy, kept, strict=True):
        param.add_(RHO * gradient / (gradient.norm() + EPS))
    again = [gradient.clone() for gradient in second]
    mixed = [(1 - ALPHA) * a + ALPHA * b for a, b in zip(kept, again, strict=True)]
    published_update(params, mixed, buffers, 0)


def tsbd_foreach(params, first, second, buffers, end) -> None:
    saved = [param.clone() for param in params]
    norms = torch._foreach_norm(first)
    torch._foreach_add_(norms, EPS)
    scales = [RHO / norm for norm in norms]
    torch._foreach_add_(params, torch._foreach_mul(first, scales))
    torch._foreach_copy_(params, saved)
    foreach_update(params, torch._foreach_lerp(first, second, ALPHA), buffers, 0)


def tsbd_in_place(saved, params, first, second, buffers, end) -> None:
    norms = torch._foreach_norm(first)
    torch._foreach_copy_(saved, params)
    for param, gradient, norm in zip(params, first, norms, strict=True):
        param.add_(gradient, alpha=RHO / (float(norm) + EPS))
    torch._foreach_copy_(params, saved)
    torch._foreach_lerp_(second, first, 1 - ALPHA)
    update_in_place(params, second, buffers, 0)


def tsbd_ours(saved, params, first, second, buffers, end) -> None:
    ops.perturb_(params, first, saved, rho=RHO, scope="tensor")
    ops.sharp_step_(params, saved, second, buffers, lr=LR, momentum=MOMENTUM, first_grads=first, alpha=ALPHA)


def ftsam_published(params, first, second, buffers, end) -> None:
    """FT-SAM's adaptive step with its gradient decomposition, which runs at alpha = 0 too; restores by subtraction."""
    norm = torch.norm(torch.stack([(param.abs() * g).norm() for param, g in zip(params, first, strict=True)]))
    old, steps = [], []
    for param, gradient in zip(params, first, strict=True):
        old.append(gradient.clone())
        step = param.pow(2) * gradient * (RHO / (norm + EPS))
        param.add_(step)
        steps.append(step)
    inner = sum((a * b).sum() for a, b in zip(old, second, strict=True))
    first_norm = torch.norm(torch.stack([g.norm() for g in old]))
    second_norm = torch.norm(torch.stack([g.norm() for g in second]))
    cosine = inner / (first_norm * second_norm + EPS)
    gradients = []
    for a, b in zip(old, second, strict=True):
        vertical = a - cosine * first_norm * b / (second_norm + EPS)
        gradients.append(b.clone().add_(vertical, alpha=-0.0))
    for param, step in zip(params, steps, strict=True):
        param.sub_(step)
    published_update(params, gradients, buffers, DECAY)


def ftsam_foreach(params, first, second, buffers, end) -> None:
    saved = [param.clone() for param in params]
    steps = torch._foreach_mul(params, first)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(steps)))
    torch._foreach_mul_(steps, params)
    torch._foreach_mul_(steps, RHO / (norm + EPS))
    torch._foreach_add_(params, steps)
    torch._foreach_copy_(params, saved)
    foreach_update(params, second, buffers, DECAY)


def ftsam_in_place(saved, params, first, second, buffers, end) -> None:
    torch._foreach_copy_(saved, params)
    steps = torch._foreach_mul(params, first)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(steps)))
    torch._foreach_mul_(steps, params)
    torch._foreach_add_(params, steps, alpha=float(RHO / (norm + EPS)))
    torch._foreach_copy_(params, saved)
    update_in_place(params, second, buffers, DECAY)


def ftsam_ours(saved, params, first, second, buffers, end) -> None:
    ops.perturb_(params, first, saved, rho=RHO, mode="asam")
    ops.sharp_step_(params, saved, second, buffers, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def pam_published(params, first, second, buffers, end) -> None:
    """PAM's step: a model of differences, clones of all parameters, restored one by one."""
    differences = [target - param for target, param in zip(end, params, strict=True)]
    throw_away = [difference.clone() for difference in differences]
    norm = torch.norm(torch.stack([x.norm() for x in throw_away]))
    old = []
    for param, x in zip(params, throw_away, strict=True):
        old.append(param.clone())
        param.add_(x * (RHO / (norm + EPS)))
    for param, x in zip(params, old, strict=True):
        param.copy_(x)
    published_update(params, second, buffers, 0)


def pam_foreach(params, first, second, buffers, end) -> None:
    saved = [param.clone() for param in params]
    steps = torch._foreach_sub(end, params)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(steps)))
    torch._foreach_mul_(steps, RHO / (norm + EPS))
    torch._foreach_add_(params, steps)
    torch._foreach_copy_(params, saved)
    foreach_update(params, second, buffers, 0)


def pam_in_place(saved, params, first, second, buffers, end) -> None:
    torch._foreach_copy_(saved, params)
    steps = torch._foreach_sub(end, params)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(steps)))
    torch._foreach_add_(params, steps, alpha=float(RHO / (norm + EPS)))
    torch._foreach_copy_(params, saved)
    update_in_place(params, second, buffers, 0)


class PamOurs:
    """The distance that one step ends at is the norm that the next one starts with."""

    def __init__(self) -> None:
        self.norm: Tensor | None = None

    def __call__(self, saved, params, first, second, buffers, end) -> None:
        ops.perturb_(params, end, saved, rho=RHO, mode="path", norm=self.norm)
        squared = ops.sharp_step_(params, saved, second, buffers, lr=LR, momentum=MOMENTUM, reference=end)
        self.norm = squared.sqrt()


class AsOptimizer:
    """The optimizer on the tensors of a list, with their momentum; the gradients are put where backward would."""

    def __init__(self, make: Callable[[list[Tensor], Lists], SharpOptimizer], state: Lists) -> None:
        self.params = [torch.nn.Parameter(param) for param in state["params"]]
        self.optimizer = make(self.params, state)
        for param, buffer in zip(self.params, state["buffers"], strict=True):
            self.optimizer.state[param]["momentum_buffer"] = buffer

    def __call__(self, first: list[Tensor], second: list[Tensor]) -> None:
        for gradients, step in ((first, self.optimizer.first_step), (second, self.optimizer.second_step)):
            for param, gradient in zip(self.params, gradients, strict=True):
                param.grad = gradient
            step()


SGD = {"lr": LR, "momentum": MOMENTUM}
OPTIMIZERS: dict[str, Callable[[list[Tensor], Lists], SharpOptimizer]] = {
    "TSBD step": lambda params, state: GradientNorm(
        params, torch.optim.SGD, rho=RHO, alpha=ALPHA, scope="tensor", **SGD
    ),
    "FT-SAM step": lambda params, state: SAM(
        params, torch.optim.SGD, rho=RHO, adaptive=True, weight_decay=DECAY, **SGD
    ),
    "PAM step": lambda params, state: PAM(params, torch.optim.SGD, reference=state["end"], rho=RHO, **SGD),
}
Step = Callable[..., None]
# Bytes that each parameter costs at the least; the published step, torch's, torch's in place, and ours.
STEPS: dict[str, tuple[int, Step, Step, Step, Callable[[], Step]]] = {
    "TSBD step": (44, tsbd_published, tsbd_foreach, tsbd_in_place, lambda: tsbd_ours),
    "FT-SAM step": (44, ftsam_published, ftsam_foreach, ftsam_in_place, lambda: ftsam_ours),
    "PAM step": (40, pam_published, pam_foreach, pam_in_place, PamOurs),
}


@pytest.mark.parametrize("case", [*lists.NETWORKS, lists.PATHOLOGICAL])
@pytest.mark.parametrize("step", STEPS)
def test_step(compare, step, case):
    bytes_each, published, foreach, in_place, make_ours = STEPS[step]
    state = fresh(case)
    spent = {**state, "second": lists.copies(state["second"])}
    saved: list[Tensor] = []
    ours = make_ours()

    def with_saved(way: Step, state: Lists) -> None:
        if not saved:  # made by the first step, so that it is counted
            saved.extend(torch.empty_like(param) for param in state["params"])
        way(saved, **state)

    def run_ours() -> None:
        with_saved(ours, state)

    optimizer = AsOptimizer(OPTIMIZERS[step], state)
    ways = {
        OURS: run_ours,
        "optimizer": lambda: optimizer(state["first"], state["second"]),
        "published": lambda: published(**state),
        "foreach": lambda: foreach(**state),
        "foreach in place": lambda: with_saved(in_place, spent),
    }

    def gate(ways):
        torch._foreach_copy_(spent["second"], state["second"])
        assert_close(same_results(ways, [*state["params"], *state["buffers"]]))

    compare(
        step,
        case,
        ways,
        moved=bytes_each * lists.elements(case),
        memory=COPYING,
        elements=lists.elements(case),
        gate=gate,
    )
