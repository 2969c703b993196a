"""Weight change, selection and zeroing of TSBD on the convolutions of a PreAct-ResNet18: three ways to do it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bdfast import ops
from bench.compare import OURS, same_results

TOP_NEURONS = 0.9
TOP_CHANGES = 0.7
ROUNDS = 3


def convolution_shapes() -> list[tuple[int, int, int, int]]:
    shapes, channels = [(64, 3, 3, 3)], 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(width, channels, 3, 3), (width, width, 3, 3)]
            channels = width
    return shapes


def weights() -> tuple[list[Tensor], list[Tensor]]:
    """The weights before and after; how far a neuron moves differs from neuron to neuron."""
    generator = torch.Generator().manual_seed(0)
    refs = [torch.randn(shape, generator=generator) * 0.05 for shape in convolution_shapes()]
    xs = []
    for ref in refs:
        size = torch.rand(len(ref), 1, 1, 1, generator=generator) * 0.01
        xs.append(ref + size * torch.randn(ref.shape, generator=generator))
    return xs, refs


def lists_and_sort(params: Sequence[Tensor], xs: Sequence[Tensor], refs: Sequence[Tensor]) -> None:
    """As it is published: Python lists of all changes, sorted as a whole, and index lists to zero by."""
    changes, ranking = {}, []
    for i, (x, ref) in enumerate(zip(xs, refs, strict=True)):
        change = (x - ref).abs()
        for row in range(len(x)):
            changes[i, row] = change[row].flatten().tolist()
            ranking.append((change[row].sum().item(), i, row))
    ranking.sort(key=lambda entry: entry[0], reverse=True)
    chosen = [(i, row) for _, i, row in ranking[: int(TOP_NEURONS * len(ranking))]]
    pool = []
    for neuron in chosen:
        pool += changes[neuron]
    pool.sort(reverse=True)
    tau = pool[int(TOP_CHANGES * len(pool)) - 1]
    for i, row in chosen:
        indices = [j for j, change in enumerate(changes[i, row]) if change >= tau]
        params[i][row].view(-1)[indices] = 0


def vectorised(params: Sequence[Tensor], xs: Sequence[Tensor], refs: Sequence[Tensor]) -> None:
    """The same with whole tensors at a time: topk for both selections, boolean masks to zero by."""
    changes = [(x - ref).abs() for x, ref in zip(xs, refs, strict=True)]
    norms = torch.cat([change.flatten(1).sum(1) for change in changes])
    neurons = torch.zeros(len(norms), dtype=torch.bool)
    neurons[norms.topk(int(TOP_NEURONS * len(norms))).indices] = True
    masks = neurons.split([len(x) for x in xs])
    pool = torch.cat([change[mask].flatten() for change, mask in zip(changes, masks, strict=True)])
    tau = pool.topk(int(TOP_CHANGES * len(pool)), sorted=False).values.min()
    for param, change, mask in zip(params, changes, masks, strict=True):
        param.masked_fill_((change >= tau) & mask[:, None, None, None], 0)


def bdfast_ops(params: Sequence[Tensor], xs: Sequence[Tensor], refs: Sequence[Tensor]) -> None:
    norms = ops.neuron_norms(xs, refs)
    neurons = torch.zeros(len(norms), dtype=torch.bool)
    neurons[norms.topk(int(TOP_NEURONS * len(norms))).indices] = True
    masks = neurons.split([len(x) for x in xs])
    pool = sum(int(mask.sum()) * x[0].numel() for mask, x in zip(masks, xs, strict=True))
    tau = ops.kth_largest_change(xs, refs, neurons, int(TOP_CHANGES * pool))
    ops.zero_changed_(params, xs, refs, neurons, tau)


def test_selection(compare):
    xs, refs = weights()
    params = [ref.clone() for ref in refs]

    def start_again() -> None:
        torch._foreach_copy_(params, refs)

    def gate(ways) -> None:
        """The very same sub-weights."""
        expected, *others = same_results(ways, params).values()
        assert all(torch.equal(a, b) for other in others for a, b in zip(expected, other, strict=True))

    compare(
        "selection and zeroing",
        "PreAct-ResNet18",
        {
            OURS: lambda: bdfast_ops(params, xs, refs),
            "lists and sort": lambda: lists_and_sort(params, xs, refs),
            "vectorised": lambda: vectorised(params, xs, refs),
        },
        # Both lists for the norms; of the selected neurons both again for the threshold, then three, of which one is
        # written.
        moved=round((8 + TOP_NEURONS * (8 + 16)) * sum(x.numel() for x in xs)),
        rounds=ROUNDS,
        gate=gate,
        prepare=start_again,
    )
