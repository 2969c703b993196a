"""Error budget and test tensors, for the tests of bdfast and for users.

A result is compared with the reference computed in float64. An element may deviate by twice the error of plain PyTorch
in the same dtype, plus a few roundings of the size of the terms that were summed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Roundings, in units of eps * scale, that a result may carry beyond those of plain PyTorch. float32 sums are added
# up in vector lanes, so that a few roundings pile up; the 16-bit results are rounded once, at the end.
ROUNDINGS = {torch.float64: 8, torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}


def _resnet18(width: int) -> list[tuple[int, ...]]:
    """The shapes of all 62 parameters of a ResNet-18 for small images."""
    shapes: list[tuple[int, ...]] = [(width, 3, 3, 3), (width,), (width,)]
    channels = width
    for out in (width, 2 * width, 4 * width, 8 * width):
        for into in (channels, out):
            shapes += [(out, into, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if into != out:
                shapes += [(out, into, 1, 1), (out,), (out,)]
        channels = out
    return [*shapes, (10, channels), (10,)]


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "resnet18": _resnet18(4),
    "ragged": [(5, 1), (3, 7), (4, 41), (2, 123), (6, 3, 3, 3), (3, 3, 7, 7)],
    "empty_first": [(0, 5), (0,), (3, 4)],
    "empty_middle": [(3, 4), (0, 3, 3), (2, 2)],
    "empty_last": [(3, 4), (2, 2), (0, 5)],
    "empty_all": [(0, 5), (0,), (0, 2, 2)],
    "no_columns": [(2, 3), (3, 0), (1, 4)],
    "many": [(1 + i % 3, 1 + i % 9) for i in range(300)],
    "wide": [(1, 10**6)],
    "tall": [(10**5, 1)],
    "scalar_rows": [(7,), (1,), (130,)],
    "channels_last": [(8, 4, 3, 3), (4, 8, 1, 1), (3, 2, 5, 5)],
    "transposed": [(6, 4), (4, 3, 3, 3), (1, 5), (5, 1)],
}


def tensor_list(
    name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
) -> list[Tensor]:
    """A list of normally distributed tensors that is hard in one respect.

    Args:
        name: A key of `SHAPES`. "channels_last" has that memory format, "transposed" has dimensions 0 and 1 swapped
            like the weights of transposed convolutions, so that rows are no blocks of memory.
        dtype: Of the tensors; the values are the same in all, up to rounding.
        device: Of the tensors.
        seed: Of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES[name]]
    if name == "channels_last":
        return [x.contiguous(memory_format=torch.channels_last) for x in tensors]
    return [x.transpose(0, 1) for x in tensors] if name == "transposed" else tensors


def changed_like(xs: Sequence[Tensor], *, size: float = 0.1, seed: int = 1) -> list[Tensor]:
    """Copies with the same strides, moved by normally distributed changes of this size."""
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for x in xs:
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        changed.append(torch.empty_like(x).copy_(x.double() + size * noise))
    return changed


def neuron_mask(xs: Sequence[Tensor], *, share: float = 0.6, seed: int = 2) -> Tensor:
    """[R] bool on the device of `xs`, true for about this share of the rows."""
    rows = sum(x.shape[0] for x in xs)
    return (torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < share).to(xs[0].device)


def assert_matches(
    actual: Tensor, expected: Tensor, *, baseline: Tensor | None = None, scale: Tensor | None = None
) -> None:
    """Assert that a result lies within the error budget around the truth.

    error(actual) <= 2 * error(baseline) + ROUNDINGS[dtype] * eps(dtype) * scale, element by element. NaN must stand
    where the truth has NaN, and infinities where it has them or is too large for the dtype.

    Args:
        actual: The result, of any shape.
        expected: The truth in float64, of the same shape.
        baseline: What plain PyTorch gives in the dtype of `actual`; None allows for no error of its own.
        scale: Sum of the absolute terms that each element was added up from; None for abs(expected).

    Raises:
        AssertionError: An element is out of budget. The message names the worst one, its error and its budget.
        ValueError: The shapes differ, or `expected` is not float64.
    """
    if expected.dtype != torch.float64:
        raise ValueError(
            f"assert_matches: expected: expected dtype torch.float64, got {expected.dtype}; compute the truth in it."
        )
    for name, x in (("actual", actual), ("baseline", baseline), ("scale", scale)):
        if x is not None and x.shape != expected.shape:
            raise ValueError(
                f"assert_matches: {name}: expected shape {list(expected.shape)} like the truth, got {list(x.shape)}; "
                "compare like with like."
            )
    eps = torch.finfo(actual.dtype).eps
    result = actual.double()
    # A value beyond the largest number of the dtype is rightly infinite in it.
    truth = torch.where(expected.to(actual.dtype).isinf(), expected.to(actual.dtype).double(), expected)
    budget = ROUNDINGS[actual.dtype] * eps * (truth.abs() if scale is None else scale.double())
    if baseline is not None:
        budget = budget + 2 * (baseline.double() - truth).abs()
    finite = truth.isfinite()
    error = torch.where(finite, (result - truth).abs(), 0.0)
    same = torch.where(finite, error <= budget, (result == truth) | (result.isnan() & truth.isnan()))
    if same.all():
        return
    excess = torch.where(same, -math.inf, torch.where(finite, error / budget, math.inf)).nan_to_num(math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{int((~same).sum())} of {same.numel()} elements are out of budget; at the worst, {worst}: expected "
        f"{truth[worst].item():.9g}, got {result[worst].item():.9g}; error {error[worst].item():.3g}, budget "
        f"{budget[worst].item():.3g}."
    )
