"""MM-BD: margins and p-values against plain transcriptions, and a network whose trigger is known."""

import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import TensorDataset

from bdfast.data.batches import Batches
from bdfast.detectors.mm_bd import MMBD, gamma_shape, improbability, log_survival, margins_of
from bdfast.training import Run
from bdfast.training.seeds import derived_seed

CLASSES = 5


class Shortcut(nn.Module):
    """Each class has a random direction in the pixels; that of `target` is far longer at four of them.

    Args:
        target: The class.
        strength: Of the backdoor; 0 for none.
        low: Least pixel value; the greatest is 3 more.
    """

    def __init__(self, target: int, strength: float, low: float = 0.0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(1)
        weight = torch.randn(CLASSES, 2 * 64, generator=draws, dtype=torch.float64)
        weight[target, [0, 1, 8, 9]] += strength
        self.weight, self.low = nn.Parameter(weight), low

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return ((images.flatten(1) - self.low) / 3) @ self.weight.T


def batches(low: float = 0.0, batch_size: int = 64) -> Batches:
    """Only shape and range of these images count."""
    images = low + 3 * torch.rand(20, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = low, low + 3
    return Batches(TensorDataset(images, torch.arange(20) % CLASSES), device="cpu", batch_size=batch_size)


def test_a_margin_is_the_distance_to_the_next_logit():
    logits = torch.tensor([[2.0, -1.0, 5.0], [4.0, 1.0, 0.0]])
    assert margins_of(logits, torch.tensor([2, 1])).tolist() == [3.0, -3.0]


def test_the_ascent_is_that_of_a_plain_transcription():
    model, method = Shortcut(2, 2.0), MMBD(starts=3, steps=25, lr=0.02, tolerance=0.0)
    found = method.run(model, batches(), Run(seed=4, amp=False)).evidence["margin"]
    for label in range(CLASSES):
        margins = []
        for start in range(3):
            draws = torch.Generator().manual_seed(derived_seed(4, "mm-bd", label, start))
            x = torch.rand(2, 8, 8, generator=draws).double()
            for _ in range(25):
                x.requires_grad_()
                logits = model((3 * x)[None])[0]
                margin = logits[label] - max(logits[k] for k in range(CLASSES) if k != label)
                (slope,) = torch.autograd.grad(margin, x)
                margins.append(float(margin.detach()))
                x = (x.detach() + 0.02 * slope).clamp(0, 1)
        assert found[label] == pytest.approx(max(margins), rel=1e-9)


def test_without_progress_the_ascent_ends():
    class Counting(Shortcut):
        passes = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.passes += 1
            return super().forward(images)

    passes = []
    for tolerance in (0.0, 0.1):
        network = Counting(0, 0.0)
        MMBD(steps=60, tolerance=tolerance).run(network, batches(), Run(amp=False))
        passes.append(network.passes - 1)  # one tells the number of classes
    assert passes[0] == 60
    assert 5 < passes[1] < 50


@pytest.mark.parametrize("target", [0, 3])
def test_a_backdoor_is_found(target):
    found, clean = (MMBD().run(Shortcut(target, s), batches(), Run(amp=False)) for s in (12.0, 0.0))
    assert found.score > MMBD.published_threshold > clean.score
    assert found.targets == (target,)
    assert found.evidence["margin"].index(max(found.evidence["margin"])) == target
    assert found.mask is found.trigger is None


def test_neither_the_values_of_the_images_nor_the_batches_matter():
    method = MMBD(starts=4, steps=40, tolerance=0.0)
    expected = method.run(Shortcut(1, 3.0), batches(), Run(amp=False))
    moved = method.run(Shortcut(1, 3.0, low=-5.0), batches(low=-5.0, batch_size=3), Run(amp=False))
    assert moved.evidence["margin"] == pytest.approx(expected.evidence["margin"])


def test_each_image_ends_by_itself():
    """So that where others end, in other batches, does not matter."""
    method = MMBD(starts=4, steps=60, tolerance=0.03)
    found = [method.run(Shortcut(1, 3.0), batches(batch_size=size), Run()).evidence["margin"] for size in (64, 7, 1)]
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert found[2] == pytest.approx(found[0], rel=1e-9)
    longer = MMBD(starts=4, steps=60, tolerance=0.0).run(Shortcut(1, 3.0), batches(), Run()).evidence["margin"]
    assert all(a < b for a, b in zip(found[0], longer, strict=True))


def test_nothing_is_computed_in_bfloat16(monkeypatch):
    class Watched(Shortcut):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.add(torch.is_autocast_enabled("cpu"))
            return super().forward(images)

    seen, run = set(), Run()
    monkeypatch.setattr("bdfast.training.precision.computes_in_bfloat16", lambda device: True)
    MMBD(starts=1, steps=2).run(Watched(1, 3.0), batches(), run)
    assert seen == {False}
    assert run.amp


def test_the_same_seed_gives_the_same_bits_and_the_network_is_left_as_it_was():
    network = Shortcut(1, 3.0).train()
    first, second, other = (
        MMBD(steps=5, classes=(4, 0, 2)).run(network, batches(), Run(seed=seed, amp=False)) for seed in (0, 0, 1)
    )
    assert str(first.evidence) == str(second.evidence) != str(other.evidence)
    assert [margin == margin for margin in first.evidence["margin"]] == [True, False, True, False, True]
    assert network.training
    assert network.weight.requires_grad
    assert network.weight.grad is None


@pytest.mark.parametrize("largest", [5.3, 6.0, 8.0, 20.0])
def test_the_p_value_is_that_of_the_largest_of_k(largest):
    rest = [3.1, 4.0, 4.4, 5.2, 3.7, 4.9]
    shape, _, scale = stats.gamma.fit(rest, floc=0)
    survival = stats.gamma.sf(largest, shape, scale=scale)
    p = -math.expm1(7 * math.log1p(-survival))
    assert improbability([*rest, largest], "gamma") == pytest.approx(-math.log10(p), rel=1e-4)
    mean = sum(rest) / 6
    p = 1 - (1 - math.exp(-largest / mean)) ** 7
    assert improbability([largest, *rest], "exponential") == pytest.approx(-math.log10(p), rel=1e-9)


def test_the_shape_solves_the_equation_of_the_greatest_likelihood():
    values = [0.2, 3.0, 1.4, 0.9]
    shape = torch.tensor(gamma_shape(values), dtype=torch.float64)
    x = torch.tensor(values, dtype=torch.float64)
    assert float(shape.log() - torch.digamma(shape)) == pytest.approx(float(x.mean().log() - x.log().mean()), rel=1e-12)
    assert gamma_shape([2.0, 2.0, 2.0]) == pytest.approx(1e4, rel=1e-3)  # a spread of a hundredth


@pytest.mark.parametrize(("shape", "x"), [(3.0, 9.0), (3.0, 900.0), (50.0, 40.0), (50.0, 2000.0), (1e4, 3e4)])
def test_tails_of_any_size_have_a_logarithm(shape, x):
    assert log_survival(shape, x) == pytest.approx(float(stats.gamma.logsf(x, shape)), rel=1e-7) or x / shape > 2
    step = 1e-6 * x  # the slope is minus density over survival
    density = (shape - 1) * math.log(x) - x - math.lgamma(shape)
    slope = (log_survival(shape, x + step) - log_survival(shape, x - step)) / (2 * step)
    assert -slope == pytest.approx(math.exp(density - log_survival(shape, x)), rel=1e-3)


def test_scores_are_never_infinite_nor_below_zero():
    assert 1e3 < improbability([1.0, 1.1, 1.2, 1e5], "gamma") < math.inf
    assert improbability([1.0, 1.0, 1.0, 1.0], "gamma") == pytest.approx(-math.log10(1 - 0.5**4), abs=0.01)
    assert improbability([1.0, 5.0, 5.0], "exponential") >= 0


def test_classes_that_are_answered_nowhere_are_left_out():
    class Silent(Shortcut):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) - 1e3 * torch.tensor([0, 1, 0, 0, 0])

    class Mute(Silent):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) - 1e3 * torch.tensor([0, 0, 0, 1, 1])

    found = MMBD(steps=50).run(Silent(0, 12.0), batches(), Run(amp=False))
    margins = found.evidence["margin"]
    assert margins[1] < 0
    assert found.score == improbability([margin for margin in margins if margin > 0], "gamma")
    assert found.notes == ("1 of 5 classes are answered nowhere in the range, and are left out.",)
    none = MMBD(steps=5).run(Mute(0, 12.0), batches(), Run(amp=False))
    assert none.score == 0
    assert "says nothing" in none.notes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"starts": 0}, "starts: expected a positive number, got 0"),
        ({"tolerance": -1}, "tolerance: expected a number of at least 0, got -1"),
        ({"null": "normal"}, "null: expected one of 'gamma', 'exponential', got 'normal'; see"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MMBD(**options)
    MMBD(**MMBD.PUBLISHED)


def test_two_classes_are_too_few():
    with pytest.raises(ValueError, match="classes: expected at least 3 classes to compare, got 2; use another"):
        MMBD(classes=(0, 1)).run(Shortcut(0, 1.0), batches(), Run())
