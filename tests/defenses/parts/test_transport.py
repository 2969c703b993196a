"""Optimal transport plans, and what they move."""

import sys

import pytest
import torch

from bdfast.defenses.parts import transport
from bdfast.defenses.parts.transport import Plan, optimal_plan

ot = pytest.importorskip("ot")


def problem(sources: int, targets: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(sources, targets, dtype=torch.float64, generator=generator)
    received = torch.rand(targets, dtype=torch.float64, generator=generator) ** 4 + 1e-9
    return cost, torch.full((sources,), 1 / sources, dtype=torch.float64), received / received.sum()


def dense(plan: Plan, sources: int) -> torch.Tensor:
    result = torch.zeros(sources, plan.received, dtype=torch.float64)
    for source, target, amount in zip(plan.sources, plan.targets, plan.amounts, strict=True):
        result[source, target] += amount
    return result


@pytest.mark.parametrize("sizes", [(1, 1), (7, 7), (40, 40), (64, 64), (9, 5), (5, 9)])
def test_a_plan_is_optimal_and_sparse(sizes):
    cost, sent, received = problem(*sizes)
    plan = optimal_plan(cost, sent, received)
    table = dense(plan, sizes[0])
    torch.testing.assert_close(table.sum(1), sent, rtol=0, atol=1e-12)
    torch.testing.assert_close(table.sum(0), received, rtol=0, atol=1e-12)
    assert (plan.amounts > 0).all()
    assert len(plan.amounts) <= sum(sizes) - 1
    assert abs(float((table * cost).sum()) - ot.emd2(sent.numpy(), received.numpy(), cost.numpy())) < 1e-9


def test_means_are_those_of_the_dense_formula():
    cost, sent, received = problem(12, 12)
    plan = optimal_plan(cost, sent, received)
    rows = torch.rand(12, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.diag(1 / received) @ dense(plan, 12).T @ rows.flatten(1)
    torch.testing.assert_close(plan.means(rows).flatten(1), expected, rtol=1e-9, atol=1e-12)


def test_a_target_to_which_nothing_comes_keeps_its_row():
    plan = Plan(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0.25, 0.75]).double(), 2)
    means = plan.means(torch.tensor([[4.0], [8.0]]).double())
    assert means.tolist() == [[7.0], [8.0]]


def test_tiny_amounts_are_divided_by_what_came():
    cost, sent, received = problem(20, 20)
    received[3] = 1e-12 * received.sum()
    plan = optimal_plan(cost, sent, received / received.sum())
    means = plan.means(torch.ones(20, 1, dtype=torch.float64))
    torch.testing.assert_close(means, torch.ones_like(means), rtol=0, atol=1e-12)


def test_a_solver_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr(transport, "ITERATIONS", 1)
    with pytest.warns(UserWarning, match="numItermax"), pytest.raises(RuntimeError, match="cost: expected costs"):
        optimal_plan(*problem(40, 40))


def test_without_pot_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ValueError, match="pip install POT"):
        optimal_plan(*problem(3, 3))
