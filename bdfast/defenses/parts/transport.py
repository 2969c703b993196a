"""Exact optimal transport: which neurons of one layer stand for which of another, as a sparse plan."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

ITERATIONS = 100_000_000
"""Most pivots of the solver, which needs far fewer; its own limit is too low for thousands of neurons."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What goes from each of n sources to each of m targets: the K pairs between which anything does.

    Attributes:
        sources: [K] int64.
        targets: [K] int64.
        amounts: [K] float64, positive.
        received: Number m of targets.
    """

    sources: Tensor
    targets: Tensor
    amounts: Tensor
    received: int

    def means(self, rows: Tensor) -> Tensor:
        """For each target the mean of what comes to it.

        A target to which nothing comes, because its amount is lost in rounding, keeps its own row.

        Args:
            rows: [n, ...] float64, what each source holds.

        Returns:
            [m, ...] float64: diag(1 / sums of the columns) T^T rows, for the plan T [n, m].
        """
        totals = torch.zeros(self.received, dtype=torch.float64).index_add_(0, self.targets, self.amounts)
        shares = self.amounts / totals[self.targets]
        moved = rows[self.sources] * shares.view(-1, *[1] * (rows.ndim - 1))
        means = rows.new_zeros(self.received, *rows.shape[1:]).index_add_(0, self.targets, moved)
        lost = (totals == 0).nonzero()[:, 0]
        means[lost] = rows[lost]
        return means


def optimal_plan(cost: Tensor, sent: Tensor, received: Tensor) -> Plan:
    """The plan of least cost, at most n + m - 1 pairs, by the network simplex of POT on the CPU.

    Args:
        cost: [n, m] float64.
        sent: [n] float64, what each source sends; positive.
        received: [m] float64, what each target receives, with the same sum.

    Raises:
        RuntimeError: The solver did not come to an end.
        ValueError: POT is not installed.
    """
    plan, log = pot().emd(sent.numpy(), received.numpy(), cost.numpy(), numItermax=ITERATIONS, log=True)
    if log["warning"] is not None:
        raise RuntimeError(
            f"cost: expected costs for which POT finds the optimal plan, got: {log['warning']}; look for infinite or "
            "very large weights."
        )
    dense = torch.from_numpy(plan)
    sources, targets = dense.nonzero(as_tuple=True)
    return Plan(sources, targets, dense[sources, targets], len(received))


def pot() -> Any:
    """The library POT, which only this needs.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return import_module("ot")
    except ModuleNotFoundError as error:
        raise ValueError(
            f'method: expected POT to be installed for "otbr", got: {error}; run `pip install POT`.'
        ) from error
