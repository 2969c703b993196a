"""The pass over all samples: equal to one sample at a time, and what lies lowest."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bdfast.data.batches import Batches
from bdfast.suppression.sample_losses import SampleScores, counted, losses_of, sample_losses, scored
from bdfast.task import IGNORED, default_forward


def scores_of(values: list[float], indices: list[int] | None = None) -> SampleScores:
    numbers = torch.arange(len(values)) if indices is None else torch.tensor(indices)
    return SampleScores(numbers, torch.tensor(values), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_batched_losses_are_those_of_one_sample_at_a_time(network, suspicious, dtype, most):
    network, data = network.to(dtype), Batches(suspicious, device="cpu", batch_size=64)
    network.train()
    network(suspicious.tensors[0].to(dtype))  # running statistics that are not those of the batch
    found = losses_of(network, data, default_forward)
    assert network.training
    network.eval()
    with torch.no_grad():
        alone = [
            F.cross_entropy(network(image.unsqueeze(0).to(dtype)), label.unsqueeze(0)) for image, label in suspicious
        ]
    assert found.scores.dtype == dtype
    assert float((found.scores - torch.stack(alone)).abs().max()) < most
    ranked = sorted(range(200), key=lambda index: (float(alone[index]), index))
    for count in (1, 2, 10, 50, 199):
        assert set(found.lowest(count).tolist()) == set(ranked[:count])
    assert found.indices.tolist() == list(range(200))
    assert torch.equal(found.labels, suspicious.tensors[1])


def test_equal_scores_go_by_index():
    assert scores_of([0.5, 0.1, 0.5, 0.5, 0.1]).lowest(4).tolist() == [0, 1, 2, 4]
    assert scores_of([0.5, 0.5, 0.5], [7, 9, 2]).lowest(2).tolist() == [0, 2]
    many = scores_of([0.0] * 5000)
    assert many.lowest(100).tolist() == list(range(100))


def test_the_sampler_of_a_loader_says_which_samples_there_are(network, suspicious):
    chosen = [5, 150, 3, 77, 120]
    loader = DataLoader(suspicious, batch_size=2, sampler=chosen)
    found = losses_of(network, Batches(loader, device="cpu"), default_forward)
    everything = losses_of(network, Batches(suspicious, device="cpu"), default_forward)
    assert found.indices.tolist() == chosen
    torch.testing.assert_close(found.scores, everything.scores[chosen], rtol=0, atol=1e-12)


def test_memory_holds_one_batch(network, suspicious):
    sizes = []

    def forward(model, batch):
        sizes.append(len(batch[0]))
        return default_forward(model, batch)

    found = losses_of(network, Batches(suspicious, device="cpu", batch_size=33), forward)
    assert max(sizes) <= 34
    assert sum(sizes) == 200
    assert not found.scores.requires_grad
    assert found.scores.untyped_storage().nbytes() == 200 * 8


def test_tokens_have_the_mean_of_those_that_count():
    draws = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 4, 6, generator=draws), torch.randint(6, (3, 4), generator=draws)
    targets[0, 2:] = IGNORED
    targets[2] = IGNORED
    losses = sample_losses(logits, targets)
    for row, count in ((0, 2), (1, 4)):
        plain = sum(float(F.cross_entropy(logits[row, t : t + 1], targets[row, t : t + 1])) for t in range(count))
        assert float(losses[row]) == pytest.approx(plain / count, abs=1e-6)
    assert float(losses[2]) == 0
    assert counted(targets).tolist() == [2, 4, 0]


def test_samples_that_do_not_count_are_never_lowest(network, suspicious):
    labels = suspicious.tensors[1].clone()
    labels[[4, 6]] = IGNORED
    data = Batches(TensorDataset(suspicious.tensors[0], labels), device="cpu")
    found = losses_of(network, data, default_forward)
    assert set(found.lowest(198).tolist()) == set(range(200)) - {4, 6}


def test_half_precision_becomes_float32():
    logits, targets = torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 0])
    assert torch.equal(sample_losses(logits, targets), F.cross_entropy(logits.float(), targets, reduction="none"))


def test_nan_names_the_sample_and_the_modes_come_back(network, suspicious):
    images = suspicious.tensors[0].clone()
    images[42] = float("nan")
    data = Batches(TensorDataset(images, suspicious.tensors[1]), device="cpu", batch_size=50)
    with pytest.raises(ValueError, match="expected a loss of every sample, got NaN for sample 42"):
        losses_of(network, data, default_forward)
    assert network.training
    other = nn.Linear(1, 1)

    def failing(batch):
        assert not network.training
        assert not other.training
        raise RuntimeError("halt")

    with pytest.raises(RuntimeError, match="halt"):
        scored([network, other], data, failing)
    assert network.training
    assert other.training
