"""FST against a plain float64 transcription of its published loop, and its loss."""

import copy
import math

import pytest
import torch
from linear_heads import BATCH, images, network, norm_of
from published_runs import assert_same, batches, published
from torch import nn
from torch.nn import functional as F

from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batches
from bdfast.defenses.fst import FSTDefense
from bdfast.defenses.loss import PreparedBatch
from bdfast.training import Run
from bdfast.training.seeds import derived_seed


def drawn(shape: torch.Size, draws: torch.Generator) -> torch.Tensor:
    return 2 * torch.rand(shape, generator=draws, dtype=torch.float64) - 1


@pytest.mark.parametrize(("alpha", "decay"), [(0.1, 0.0), (0.5, 0.01), (0.0, 0.0)])
def test_fst(alpha, decay):
    """The classifier anew; per update the gradient plus alpha W_ori, and the norm; SGD with a cosine of the epochs."""
    model, data, epochs, lr = network(), images(), 6, 0.05
    expected = copy.deepcopy(model).train()
    origin, original_norm = model[4].weight.detach().clone(), norm_of(model[4].weight)
    draws = torch.Generator().manual_seed(derived_seed(0, "classifier"))
    with torch.no_grad():
        for parameter in (expected[4].weight, expected[4].bias):
            parameter.copy_(drawn(parameter.shape, draws) / math.sqrt(64))
    params = list(expected.parameters())
    velocity = [torch.zeros_like(parameter) for parameter in params]
    steps = 0
    for pixels, labels in batches(data, BATCH, epochs):
        rate = lr * (1 + math.cos(math.pi * (steps // 5) / epochs)) / 2
        logits = expected(pixels).log_softmax(1)
        loss = -sum(logits[index, label] for index, label in enumerate(labels)) / len(labels)
        gradients = list(torch.autograd.grad(loss, params))
        gradients[4] = gradients[4] + alpha * origin
        with torch.no_grad():
            for parameter, gradient, moving in zip(params, gradients, velocity, strict=True):
                moving.mul_(0.9).add_(gradient + decay * parameter)
                parameter.sub_(rate * moving)
            expected[4].weight.mul_(original_norm / norm_of(expected[4].weight))
        steps += 1
    assert steps == 5 * epochs
    changes = {"alpha": alpha, "weight_decay": decay, "epochs": epochs, "lr": lr}
    result = published(model, data, FSTDefense, BATCH, **changes)
    assert_same(result.model, expected, model)
    assert norm_of(result.model[4].weight) == pytest.approx(original_norm, rel=1e-12)


def test_the_loss_is_cross_entropy_and_the_inner_product():
    model, given = network(), network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    loss = FSTDefense(alpha=0.3, overlay=0.0).away(given, Run(amp=False), "4")
    batch = tuple(images(10).tensors)
    result = loss(model, PreparedBatch(batch))
    logits = model(batch[0])
    expected = F.cross_entropy(logits, batch[1])
    for ours, theirs in zip(model[4].weight.flatten().tolist(), given[4].weight.flatten().tolist(), strict=True):
        expected = expected + 0.3 * ours * theirs
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    assert int(result.hits) == int((logits.argmax(1) == batch[1]).sum())
    result.loss.backward()
    assert all(parameter.grad is None for parameter in given.parameters())


def test_the_new_classifier_is_drawn_from_the_seed_and_a_frozen_bias_is_kept():
    model = network()
    model[4].bias.requires_grad_(False)
    data = Batches(images(), device="cpu", batch_size=BATCH)

    def begun(seed: int) -> nn.Linear:
        copied = copy.deepcopy(model)
        state = torch.get_rng_state()
        FSTDefense().begin(copied, model, data, Run(seed=seed, amp=False), None)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(
            torch.equal(x, model.state_dict()[name]) for name, x in copied.state_dict().items() if name != "4.weight"
        )
        return copied[4]

    first, again, other = begun(0), begun(0), begun(1)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert 0.9 / 8 < float(first.weight.detach().abs().max()) <= 1 / 8
    assert abs(float(first.weight.detach().mean())) < 0.02


def test_options_of_fst_are_checked_and_the_published_ones_are_arguments_of_purify():
    with pytest.raises(ValueError, match="alpha: expected at least 0, got -1"):
        FSTDefense(alpha=-1)
    assert FSTDefense.PUBLISHED["augment"] == Augmentation(shift=4, flip=True)
    result = published(network(), images(8), FSTDefense, 128, augment=FSTDefense.PUBLISHED["augment"])
    assert [getattr(row, "stage", "setup") for row in result.history] == ["setup"] + 10 * ["fine-tune"]
