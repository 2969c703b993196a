"""D3 against a plain float64 transcription of its published loop (ab96c36), and its loss."""

import copy

import pytest
import torch
from linear_heads import BATCH, images, network, norm_of
from published_runs import assert_same, batches, published
from torch import nn
from torch.nn import functional as F

from bdfast.data.augmentation import Augmentation
from bdfast.defenses.d3 import D3Defense, DistanceLoss
from bdfast.defenses.distillation import TEMPERATURE
from bdfast.defenses.loss import PreparedBatch
from bdfast.task import IGNORED
from bdfast.training import Run
from bdfast.training.seeds import derived_seed


def distance_loss(given: nn.Module, **options) -> DistanceLoss:
    return D3Defense(overlay=0.0, **options).away(given, Run(amp=False), "4")


@pytest.mark.parametrize(("weight", "eps"), [(0.5, 0.1), (0.5, 0.8), (1.0, 0.0), (4.0, 0.5)])
def test_d3(weight, eps):
    """From a random point of the sphere; above a weight of 1 the published code scales the loss, and we the rate."""
    model, data, epochs, lr = network(), images(), 6, 0.05
    expected = copy.deepcopy(model).train()
    origin, original_norm = model[4].weight.detach().clone(), norm_of(model[4].weight)
    draws = torch.Generator().manual_seed(derived_seed(0, "classifier"))
    with torch.no_grad():
        start = torch.rand(origin.shape, generator=draws, dtype=torch.float64) - 0.5
        expected[4].weight.copy_(start * (original_norm / norm_of(start)))
    assert torch.equal(expected[4].bias, model[4].bias)
    optimizer = torch.optim.SGD(expected.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    steps, counted = 0, 0
    for pixels, labels in batches(data, BATCH, epochs):
        logits = expected(pixels).log_softmax(1)
        above = [-logits[index, label] - eps for index, label in enumerate(labels)]
        counted += sum(bool(value > 0) for value in above)
        clean = sum((value for value in above if value > 0), torch.zeros((), dtype=torch.float64)) / len(labels)
        loss = weight * clean - ((expected[4].weight - origin) ** 2).sum().sqrt()
        if weight > 1:
            loss = loss / (weight + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            expected[4].weight.mul_(original_norm / norm_of(expected[4].weight))
        steps += 1
        if steps % 5 == 0:
            schedule.step()
    assert steps == 5 * epochs
    assert (0 < counted < 40 * epochs) if eps > 0.1 else counted == 40 * epochs
    ours = lr / (weight + 1) if weight > 1 else lr
    result = published(model, data, D3Defense, BATCH, clean_weight=weight, eps=eps, epochs=epochs, lr=ours)
    assert_same(result.model, expected, model)
    assert norm_of(result.model[4].weight) == pytest.approx(original_norm, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_images_below_the_threshold_and_ignored_ones_do_not_count(smoothing):
    model, given = network(), network()
    with torch.no_grad():
        model[4].weight.mul_(8).add_(0.1)
    loss = distance_loss(given, clean_weight=0.7, eps=0.9, label_smoothing=smoothing)
    pixels, labels = images(20).tensors
    labels[:3] = IGNORED
    result = loss(model, PreparedBatch((pixels, labels)))
    errors = []
    for logits, label in zip(model(pixels).log_softmax(1), labels.tolist(), strict=True):
        if label != IGNORED:
            errors.append(float(-((1 - smoothing) * logits[label] + smoothing * logits.mean()).detach()))
    assert any(error > 0.9 for error in errors)
    assert any(error < 0.9 for error in errors)
    clean = sum(max(0.0, error - 0.9) for error in errors) / 17
    distance = norm_of(model[4].weight - given[4].weight)
    assert float(result.loss.detach()) == pytest.approx(0.7 * clean - distance, rel=1e-12)
    assert int(result.total) == 17


def test_the_loss_with_a_share_of_the_teacher():
    model, given = network(), network()
    with torch.no_grad():
        model[4].weight.add_(0.1)
    loss = distance_loss(given, distill=0.25, eps=0.9)
    pixels, labels = images(20).tensors
    prepared = loss.prepare((pixels, labels))
    result = loss(model, prepared)
    logits, answers = model(pixels), given.eval()(pixels)
    clean = F.relu(F.cross_entropy(logits, labels, reduction="none") - 0.9).mean()
    p, q = (answers / TEMPERATURE).softmax(1), (logits / TEMPERATURE).softmax(1)
    divergence = TEMPERATURE**2 * (p * (p / q).log()).sum(1).mean()
    expected = 0.5 * (0.75 * clean + 0.25 * divergence) - norm_of(model[4].weight - given[4].weight)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)


def test_the_distance_has_a_gradient_of_zero_where_it_is_zero_and_of_one_elsewhere():
    model, given = network().eval(), network()
    pixels, labels = images(20).tensors

    def gradient_of_distance() -> torch.Tensor:
        model.zero_grad()
        distance_loss(given, eps=100.0)(model, PreparedBatch((pixels, labels))).loss.backward()
        return model[4].weight.grad

    assert not gradient_of_distance().any()
    for size in (1e-8, 1.0):
        with torch.no_grad():
            model[4].weight.copy_(given[4].weight).sub_(size)
        assert norm_of(gradient_of_distance()) == pytest.approx(1.0, rel=1e-6)
        assert bool((model[4].weight.grad > 0).all())
    assert all(parameter.grad is None for parameter in given.parameters())


def test_options_of_d3_are_checked_and_the_published_ones_are_arguments_of_purify():
    with pytest.raises(ValueError, match="clean_weight: expected a positive number, got 0"):
        D3Defense(clean_weight=0.0)
    with pytest.raises(ValueError, match="eps: expected at least 0, got -1"):
        D3Defense(eps=-1)
    assert D3Defense.PUBLISHED["augment"] == Augmentation(shift=4, flip=True)
    result = published(network(), images(8), D3Defense, 256, augment=D3Defense.PUBLISHED["augment"])
    assert [getattr(row, "stage", "setup") for row in result.history] == ["setup"] + 100 * ["fine-tune"]
