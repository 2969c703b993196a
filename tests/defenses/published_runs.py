"""What the tests share that compare a method with a transcription of its published loop."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import TensorDataset

import bdfast
from bdfast.data.batches import Batches
from bdfast.training.seeds import derived_seed


def batches(data: TensorDataset, size: int, epochs: int, stage: str = "fine-tune") -> Iterator[list[torch.Tensor]]:
    """In our order; that of the published loader, which shuffles too, depends on more than a seed."""
    for epoch in range(1, epochs + 1):
        seed = derived_seed(0, stage, epoch)
        torch.manual_seed(seed)
        yield from Batches(data, device="cpu", batch_size=size).shuffled(seed)


def published(model: nn.Module, data: TensorDataset, cls: type, size: int, **changes) -> bdfast.PurifyResult:
    """The published run, on images as they are and batches of `size`."""
    method = next(name for name, known in bdfast.defenses.METHODS.items() if known is cls)
    settings = {**cls.PUBLISHED, "batch_size": size, "augment": None, **changes}
    return bdfast.purify(model, data, method=method, **settings)


def purified(model: nn.Module, data: TensorDataset, cls: type, size: int, **changes) -> nn.Module:
    """What the published run makes of the model."""
    return published(model, data, cls, size, **changes).model


def assert_same(model: nn.Module, expected: nn.Module, start: nn.Module, *, counters: bool = True) -> None:
    """Within 1e-9, after a way of a tenth at least; `counters`: BatchNorm has counted the same batches, too."""
    states = {key: x for key, x in expected.state_dict().items() if counters or "num_batches" not in key}
    assert max(float((model.state_dict()[key] - x).abs().max()) for key, x in states.items()) < 1e-9
    assert max(float((start.state_dict()[key] - x).abs().max()) for key, x in states.items()) > 0.1
