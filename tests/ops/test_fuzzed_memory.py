"""Random views into a few buffers, at any byte: each op is right, or refuses and has changed nothing.

What is right is computed on copies. What has to be refused is decided here by sets of addresses, byte by byte.
"""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bdfast import ops
from bdfast.ops import reference
from bdfast.ops.backends import backends, use_backend
from bdfast.testing import assert_matches

CASES = 2000
BYTES = 400
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Lists, those that are written, those that may hold the tensors of `params`, vectors.
OPS = {
    "neuron_norms": (("xs", "refs"), (), (), ()),
    "kth_largest_change": (("xs", "refs"), (), (), ("neurons",)),
    "zero_changed_": (("params", "xs", "refs"), ("params",), ("xs", "refs"), ("neurons", "tau")),
    "scale_neurons_": (("params",), ("params",), (), ("scale",)),
    "perturb_": (("params", "dirs", "saved"), ("params", "saved"), ("dirs",), ("norm",)),
    "sharp_step_": (
        ("params", "saved", "grads", "momentum_buffers", "first_grads", "references"),
        ("params", "momentum_buffers"),
        ("saved",),
        (),
    ),
}
SGD = (0.1, 0.9, 0.2, False, 0.01, 0.7, False)
LAYOUTS = ("plain", "plain", "plain", "swapped", "every second", "wide rows", "expanded")


def strides_of(shape, layout):
    strides, step = [0] * len(shape), 1
    order = list(range(len(shape)))
    if layout == "swapped":
        order.reverse()
    for d in reversed(order):
        strides[d] = step
        step *= max(1, shape[d])
    if layout == "every second":
        strides = [2 * stride for stride in strides]
    elif layout == "wide rows":
        strides[0] += 2
    elif layout == "expanded":
        strides[-1] = 0
    return strides


@st.composite
def cases(draw):
    op = draw(st.sampled_from(sorted(OPS)))
    lists, _, _, vectors = OPS[op]
    shapes = draw(st.lists(st.sampled_from([(3,), (2, 3), (4, 2), (1, 5), (2, 1, 2), (0, 2)]), min_size=1, max_size=3))
    count = (len(lists) + len(vectors)) * len(shapes)
    return {
        "op": op,
        "dtype": draw(st.sampled_from(DTYPES)),
        "shapes": shapes,
        # Half of the cases are such that only overlap keeps a native kernel from running.
        "native": (native := draw(st.booleans())),
        "layouts": ["plain" if native else draw(st.sampled_from(LAYOUTS)) for _ in shapes],
        # Where each tensor lies: apart from the others, where entry i of the first list lies, or in the shared buffer.
        "places": draw(
            st.lists(st.sampled_from(["apart"] * 6 + ["odd", "same", "shared"]), min_size=count, max_size=count)
        ),
        "starts": draw(st.lists(st.integers(0, 160), min_size=count, max_size=count)),
        "option": draw(st.integers(0, 5)),
        "seed": draw(st.integers(0, 2**20)),
    }


def make(case):
    """The buffers, and the arguments as views into them."""
    generator = torch.Generator().manual_seed(case["seed"])
    dtype, size = case["dtype"], case["dtype"].itemsize
    numbers = itertools.count()
    buffers = []

    def buffer():
        # Read from any byte on, in any dtype, these are numbers of moderate size.
        bits = torch.randint(0, 8, (BYTES,), generator=generator)
        buffers.append(((bits & 3) + 0x3C + 0x80 * (bits >> 2)).to(torch.uint8))
        return buffers[-1]

    def place(numel, kind, lead):
        number = next(numbers)
        where, start = case["places"][number], case["starts"][number]
        if where == "same" and lead is not None:
            return lead
        if where == "shared":
            return shared, start // 8 * 8 if case["native"] or start % 3 == 0 else start
        return buffer(), start % size if where == "odd" and not case["native"] else 0

    def view(at, dtype, shape, strides):
        memory, start = at
        flat = torch.frombuffer(memory.numpy(), dtype=dtype, offset=start, count=(BYTES - start) // dtype.itemsize)
        return flat.as_strided(shape, strides)

    shared = buffer()
    lists, vectors, _, names = [], {}, None, OPS[case["op"]]
    leads = [None] * len(case["shapes"])
    for _ in names[0]:
        tensors = []
        for i, (shape, layout) in enumerate(zip(case["shapes"], case["layouts"], strict=True)):
            at = place(torch.Size(shape).numel(), size, leads[i])
            leads[i] = leads[i] or at
            tensors.append(view(at, dtype, shape, strides_of(shape, layout)))
        lists.append(tensors)
    rows = sum(shape[0] for shape in case["shapes"])
    for name in names[3]:
        kind = torch.bool if name == "neurons" else torch.float32
        shape = {"tau": (), "neurons": (rows,), "scale": (rows,)}.get(name, ())
        if name == "norm" and case["option"] % 2:
            shape = (len(case["shapes"]),)
        vector = view(place(rows, kind.itemsize, leads[0]), kind, shape, (1,) * len(shape))
        if kind is torch.bool:
            vector.view(torch.uint8).copy_(torch.randint(0, 2, shape, generator=generator))
        vectors[name] = vector
    return buffers, dict(zip(names[0], lists, strict=True)), vectors


def addresses(x):
    """Of all bytes, one by one; those that are reached twice come twice."""
    starts = [x.data_ptr()]
    for n, stride in zip(x.shape, x.stride(), strict=True):
        starts = [start + i * stride * x.itemsize for start in starts for i in range(n)]
    return [start + byte for start in starts for byte in range(x.itemsize)]


def has_to_be_refused(op, lists, vectors):
    """Whether something that is written is reached in a way that is not allowed."""
    names, written, same, _ = OPS[op]
    uses = [(name, i, x, addresses(x)) for name in names for i, x in enumerate(lists[name])]
    uses += [(name, 0, x, addresses(x)) for name, x in vectors.items()]
    if any(name in written and len(set(bytes_)) < len(bytes_) for name, _, _, bytes_ in uses):
        return True
    for a, b in itertools.combinations(uses, 2):
        allowed = a[0] == names[0] and b[0] in same and a[1] == b[1] and a[2].data_ptr() == b[2].data_ptr()
        if (a[0] in written or b[0] in written) and not allowed and set(a[3]) & set(b[3]):
            return True
    return False


def arguments(case, lists, vectors):
    """Positional, as the reference takes them."""
    option = case["option"]
    if case["op"] == "neuron_norms":
        return [lists["xs"], lists["refs"] if option % 2 else [], (1.0, 2.0, float("inf"))[option // 2]]
    if case["op"] == "kth_largest_change":
        return [*lists.values(), vectors["neurons"], 1 + option]
    if case["op"] == "perturb_":
        scope = ("global", "tensor")[option % 2]
        return [*lists.values(), vectors.get("norm"), 3.0, ("sam", "asam", "path")[option // 2], scope, 1e-12]
    return [*lists.values(), *vectors.values(), *(SGD if case["op"] == "sharp_step_" else ())]


def call(op, args):
    function = getattr(ops, op)
    if op == "neuron_norms":
        return function(args[0], args[1] or None, ord=args[2])
    if op == "perturb_":
        keys = ("norm", "rho", "mode", "scope", "eps")
        return function(*args[:3], **dict(zip(keys, args[3:], strict=True)))
    if op == "sharp_step_":
        keys = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "alpha", "maximize")
        options = dict(zip(keys, args[6:], strict=True))
        return function(*args[:4], first_grads=args[4], reference=args[5], **options)
    return function(*args)


def copied(args, dtype=None):
    """Contiguous and apart; the lists in this dtype."""

    def copy(x, dtype=None):
        return torch.empty(x.shape, dtype=dtype or x.dtype).copy_(x)

    return [
        [copy(y, dtype) for y in x] if isinstance(x, list) else copy(x) if isinstance(x, torch.Tensor) else x
        for x in args
    ]


def selected(xs, neurons):
    masks = neurons.split([len(x) for x in xs])
    return sum(int(mask.sum()) * x[0].numel() for x, mask in zip(xs, masks, strict=True) if len(x))


def outside(buffers, tensors):
    """The bytes of the buffers that no tensor of these reaches."""
    taken = set(itertools.chain.from_iterable(map(addresses, tensors)))
    return [b for x in buffers for at, b in enumerate(x.tolist(), x.data_ptr()) if at not in taken]


def check(case):
    """'right', 'refused' or 'too large a q'; an assertion fails for everything else."""
    op = case["op"]
    buffers, lists, vectors = make(case)
    if op == "perturb_" and case["seed"] % 2:
        vectors.pop("norm")
    args = arguments(case, lists, vectors)
    used = {name: x for name, x in lists.items() if any(x is arg for arg in args)}
    plain, truth = copied(args), copied(args, torch.float64)
    if op == "kth_largest_change" and args[3] > selected(lists["xs"], vectors["neurons"]):
        with pytest.raises(ValueError, match="kth_largest_change: q: expected"):
            call(op, args)
        return "too large a q"
    baseline, exact = (getattr(reference, op)(*x) for x in (plain, truth))
    before = [x.clone() for x in buffers]
    _, written, *_ = OPS[op]
    beside = outside(buffers, [x for name in written for x in lists[name]])
    refuse = has_to_be_refused(op, {name: used.get(name, []) for name in lists}, vectors)
    if refuse:
        with pytest.raises(ValueError, match=rf"^{op}: \w+(\[\d\])?: expected .* got .*; "):
            call(op, args)
        assert all(map(torch.equal, buffers, before))
        return "refused"
    result = call(op, args)
    assert outside(buffers, [x for name in written for x in lists[name]]) == beside
    to_the_bit = op in ("kth_largest_change", "zero_changed_", "scale_neurons_")
    if result is not None:
        if to_the_bit:
            assert torch.equal(result, baseline.to(result.dtype))
        else:
            assert_matches(result, exact.double(), baseline=baseline.float())
    for place, name in enumerate(lists):
        if name in written:
            for got, expected, true in zip(lists[name], plain[place], truth[place], strict=True):
                if to_the_bit or name == "saved":
                    assert torch.equal(got, expected)
                else:
                    assert_matches(got.contiguous(), true, baseline=expected, scale=torch.full_like(true, 8.0))
    return "right"


@pytest.mark.slow
@pytest.mark.usefixtures("uncounted")  # other tests reach the same lines
def test_any_memory():
    counts = {name: Counter() for name in ("cpu", "torch") if backends()[name].available}

    @settings(
        max_examples=CASES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case):
        for name, count in counts.items():
            with use_backend(name):
                count[check(case)] += 1

    run()
    for count in counts.values():
        assert count.total() == CASES
        assert min(count["right"], count["refused"]) > CASES // 10
