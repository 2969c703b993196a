"""Lists and fixtures for the interpreted cases; test_interpreted.py names it as a plugin."""

import math
from collections import Counter

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from bdfast.kernels import tables
from bdfast.ops import checks
from bdfast.testing import changed_like, tensor_list

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Widths around those of the tiles, among them 27 and 147 of first layers; the last rows are cut.
ODD = [(5, 27), (3, 147), (70, 12), (9, 8), (3, 256), (5, 264), (3, 1031), (1, 17_000), (600, 1)]
NAMES = ["odd", "ragged", "empty_first", "empty_middle", "empty_last", "no_columns", "scalar_rows", "channels_last"]
# Every list once, and one list in every dtype: a program takes milliseconds here.
CASES = [
    *[(name, torch.float32) for name in [*NAMES, "resnet18", "transposed"]],
    *[("odd", dtype) for dtype in DTYPES[1:]],
]


def padded(x, start):
    """The same tensor in memory that begins `start` elements after an aligned address, between NaN."""
    base = torch.full((x.numel() + 128,), math.nan, dtype=x.dtype)
    start += 64 - base.data_ptr() % 64 // x.itemsize
    return base[start : start + x.numel()].view(x.shape).copy_(x)


def around(x):
    """What stands next to a padded tensor."""
    base = x._base
    start = x.storage_offset()
    return torch.cat([base[:start], base[start + x.numel() :]])


def scene(name, dtype=torch.float32, seed=0):
    """A list of `bdfast.testing`, or one of odd shapes that begin anywhere, as the checks hand it to a kernel."""
    if name == "odd":
        generator = torch.Generator().manual_seed(seed)
        return [padded(torch.randn(shape, generator=generator).to(dtype), i % 5) for i, shape in enumerate(ODD)]
    lists = {"xs": tensor_list(name, dtype=dtype, seed=seed)}
    checks.make_readable(lists)
    return lists["xs"]


def like(xs, size=0.1, seed=1):
    """Changed copies, at other places in memory."""
    changed = changed_like(xs, size=size, seed=seed)
    return [padded(y, i % 3) if y.is_contiguous() else y for i, y in enumerate(changed)]


def copies(tensors):
    return [x.clone() for x in tensors]


def wide(tensors):
    return [x.double() for x in tensors]


def bits(x):
    return x.flatten().view(torch.int32 if x.itemsize == 4 else torch.int16)


def same_bits(first, second):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))


@pytest.fixture
def launched(monkeypatch):
    """Counts the launches by the names of the kernels."""
    counts = Counter()
    original = GridExecutor.__call__

    def counting(self, *args, **kwargs):
        counts[self.fn.__name__] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counting)
    return counts


@pytest.fixture(autouse=True)
def fresh():
    """No table is left from another test, and an element that a kernel forgets to write is NaN."""
    tables._tables.clear()
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
