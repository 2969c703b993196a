"""The distance of the weights to references, kept from one step to the next while nothing else changes the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bdfast import ops
from bdfast.ops.lists import grouped, kind, lay_out, rows, with_rows, workable

WHOLE = 1 << 16
"""In a model of up to this many weights, all are compared."""

SAMPLES = 256
"""In a larger model, this many weights of each tensor are compared, or about one of each row if it has more rows."""


class CarriedDistance:
    """The distance after a step, and what shows that the weights are still those of that step.

    A write through `.data` does not raise the version of a tensor. So the addresses of the parameters and a sample of
    their weights are compared too.
    """

    def __init__(self) -> None:
        self._distance: Tensor | None = None
        self._ids: list[int] = []
        self._places: object = []
        self._samples: list[list[Tensor]] = []
        self._seen: list[Tensor] = []
        self._versions = 0

    def __bool__(self) -> bool:
        return self._distance is not None

    def forget(self) -> None:
        """The weights have changed, so that the distance does not hold any more."""
        self._distance = None

    def renew(self, params: Sequence[Tensor], references: Sequence[Tensor]) -> None:
        """The weights were moved and have been restored: only their versions differ."""
        self._versions = _versions(params) + _versions(references)

    def keep(self, distance: Tensor, params: Sequence[Tensor], references: Sequence[Tensor], places: object) -> None:
        """Keep the distance of these parameters; `places` are those of all parameters, see `lists.places_of`."""
        self._distance = None
        if places != self._places or [*map(id, params)] != self._ids:
            works, copied = workable(params)
            if copied:
                return  # a sample is read from memory without gaps
            self._ids, self._places = [*map(id, params)], places
            whole = sum(x.numel() for x in works) <= WHOLE
            samples = [(kind(x), _sample(x, whole)) for x in works if x.numel()]
            self._samples = list(grouped(samples).values())
        self._seen = [torch.cat(samples) for samples in self._samples]
        self._versions = _versions(params) + _versions(references)
        self._distance = distance

    def get(self, params: Sequence[Tensor], references: Sequence[Tensor], places: object) -> Tensor | None:
        """The distance of these parameters, None where they may have changed."""
        # `_samples` keeps this memory allocated, so no other tensor can have got these addresses.
        if self._distance is None or places != self._places or [*map(id, params)] != self._ids:
            return None
        if self._versions != _versions(params) + _versions(references):
            return None
        now = [torch.cat(samples) for samples in self._samples]
        return self._distance if all(map(torch.equal, now, self._seen)) else None


def measured(params: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The distance, with the same bits for the same weights, whatever the thread count."""
    works, _ = workable(params)
    squares = []
    pairs = [(kind(work), (work, x)) for work, x in zip(works, lay_out(references, works), strict=True)]
    for group in grouped(pairs).values():
        norms = ops.neuron_norms(rows([x for x, _ in group]), rows([x for _, x in group]), ord=2)
        squares += norms.double().square().tolist()
    return math.sqrt(math.fsum(squares))


def found(distance: float, then: float, params: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor | None:
    """A stored distance, if these weights measure what was measured when it was stored, `then`.

    In 16 bits the distance itself differs from what is measured: the step computes it before it rounds the weights.
    """
    if not math.isclose(measured(params, references), then, rel_tol=1e-6):
        return None
    return torch.tensor(distance, dtype=torch.float32)


def _sample(x: Tensor, whole: bool) -> Tensor:
    """Weights in the order of memory, in which the rows follow each other."""
    x = with_rows(x)
    columns = x.numel() // x.shape[0]
    step = 1 if whole else max(1, min(x.numel() // SAMPLES, max(columns, 16)))  # at most one per cache line
    step -= step % 2 == 0  # an even step would often read only a few columns
    return x.as_strided((-(-x.numel() // step),), (step,))


def _versions(tensors: Sequence[Tensor]) -> int:
    try:
        return sum([x._version for x in tensors])
    except RuntimeError:  # inference tensors have none; outside of inference mode they cannot be written in place
        return sum([x._version for x in tensors if not x.is_inference()])
