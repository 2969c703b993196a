"""The distance of the weights to others, carried from step to step as long as nobody else changes the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bdfast import ops
from bdfast.ops.lists import grouped, kind, laid_out_like, with_rows, workable

SAMPLES = 512
"""How many weights of a tensor are looked at, up to twice as many; smaller ones are looked at as a whole."""

Stored = tuple[float, float]
"""What a step carried on, and what was measured when it was stored."""


class CarriedDistance:
    """The distance that a step ended at, and what shows that the weights are still those of that step.

    Whoever writes through `.data` raises no version. So the memory itself is compared too: whether the parameters lie
    where they lay, and a sample of their weights.
    """

    def __init__(self) -> None:
        self._distance: Tensor | None = None
        self._params: list[Tensor] = []
        self._places: list[object] = []
        self._samples: list[list[Tensor]] = []
        self._seen: list[Tensor] = []
        self._versions = 0

    def __getstate__(self) -> dict[str, object]:
        return {}  # a copy has its weights elsewhere

    def __setstate__(self, state: dict[str, object]) -> None:
        CarriedDistance.__init__(self)

    def __bool__(self) -> bool:
        return self._distance is not None

    def forget(self) -> None:
        """It is that of other weights by now."""
        self._distance = None

    def keep(self, distance: Tensor, params: Sequence[Tensor], references: Sequence[Tensor]) -> None:
        """Keep the distance of these parameters as they stand."""
        self._distance = None
        if not self._lie_there(params):
            works, copied = workable(params)
            if copied:
                return  # their memory belongs to others as well, or cannot be sampled
            self._params, self._places = list(params), [_place(x) for x in params]
            samples = [(kind(x), _sample(x)) for x in works if x.numel()]
            self._samples = list(grouped(samples).values())
        self._seen = [torch.cat(samples) for samples in self._samples]
        self._versions = _versions(params, references)
        self._distance = distance

    def get(self, params: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor | None:
        """The distance of these parameters, None where they may have changed."""
        if self._distance is None or not self._lie_there(params) or self._versions != _versions(params, references):
            return None
        now = [torch.cat(samples) for samples in self._samples]
        return self._distance if all(map(torch.equal, now, self._seen)) else None

    def _lie_there(self, params: Sequence[Tensor]) -> bool:
        # The samples hold on to their memory, so that an address cannot have come back to another.
        return [*map(id, params)] == [*map(id, self._params)] and [_place(x) for x in params] == self._places


def measured(params: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The distance, with the same bits for the same weights, whatever the thread count."""
    works, _ = workable(params)
    squares = []
    pairs = [(kind(work), (work, laid_out_like(x, work))) for work, x in zip(works, references, strict=True)]
    for group in grouped(pairs).values():
        norms = ops.neuron_norms([with_rows(x) for x, _ in group], [with_rows(x) for _, x in group], ord=2)
        squares += norms.double().square().tolist()
    return math.sqrt(math.fsum(squares))


def stored(distance: Tensor, params: Sequence[Tensor], references: Sequence[Tensor]) -> Stored:
    """The distance as two numbers for a checkpoint, from which `found` takes it up with the same bits."""
    return float(distance), measured(params, references)


def found(numbers: Stored, params: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor | None:
    """The distance that was stored, if these weights are as far away as those it was stored with."""
    carried, then = numbers
    # In 16 bits the two differ: the step measures before it rounds. Hence both are stored, and like compared with like.
    return torch.tensor(carried) if math.isclose(measured(params, references), then, rel_tol=1e-6) else None


def _place(x: Tensor) -> object:
    return (x.data_ptr(), x.dtype, x.shape, x.stride()) if x.layout is torch.strided else x.layout


def _sample(x: Tensor) -> Tensor:
    step = max(1, x.numel() // SAMPLES)
    step += step > 1 and step % 2 == 0  # an even one would often stay in a few columns
    return x.as_strided((-(-x.numel() // step),), (step,))


def _versions(params: Sequence[Tensor], references: Sequence[Tensor]) -> int:
    # Inference tensors have no version, and nobody can write to them in place outside of inference mode.
    return sum(x._version for x in params) + sum(x._version for x in references if not x.is_inference())
