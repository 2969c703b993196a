"""B3D: its gradients on functions whose gradient is known, against a plain transcription, and on plain functions."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bdfast.data.batches import Batches
from bdfast.detectors import nes
from bdfast.detectors.b3d import B3D
from bdfast.detectors.black_box_patch import PatchSearch, noise_images, share_of
from bdfast.training import Run

CLASSES = 4
QUICK = {"steps": 150, "probes": 12, "images": 4, "lr": 0.15}


class Box:
    """Answers with probabilities only: which of four column pairs is brightest, or `target` where a corner is lit."""

    def __init__(self, target: int, strength: float) -> None:
        self.target, self.strength = target, strength
        self.most = self.asked = 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert not images.requires_grad
        assert not torch.is_grad_enabled()
        assert images.dtype == torch.float32
        assert -2 - 1e-5 <= float(images.min()) <= float(images.max()) <= 2 + 1e-5
        self.most, self.asked = max(self.most, len(images)), self.asked + len(images)
        with torch.inference_mode():
            unit = (images.mean(1) + 2) / 4
            lit = unit[:, 6:, 6:].mean((1, 2))[:, None] * F.one_hot(torch.tensor(self.target), CLASSES)
            pairs = unit[:, :6].unflatten(2, (CLASSES, 2)).mean((1, 3))
            return (20 * (pairs + self.strength * lit)).softmax(1)


def deaf(images: torch.Tensor) -> torch.Tensor:
    return F.one_hot(torch.zeros(len(images), dtype=torch.long), CLASSES).float()


def batches(batch_size: int = 64) -> Batches:
    """In [-2, 2]; a pair of columns tells the class."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % CLASSES
    images = 0.1 * torch.rand(60, 2, 8, 8, generator=draws)
    for offset in (0, 1):
        images[torch.arange(60), :, :6, 2 * labels + offset] += 0.9
    images[0, 0, 7, 0], images[1, 0, 7, 0] = 0, 1  # the limits
    return Batches(TensorDataset(4 * images - 2, labels), device="cpu", batch_size=batch_size)


@pytest.mark.parametrize("baseline", [False, True])
def test_the_mean_of_many_gradients_is_that_of_a_quadratic(baseline):
    draws = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 5, generator=draws, dtype=torch.float64)
    matrix, slope = matrix @ matrix.T / 5, torch.randn(5, generator=draws, dtype=torch.float64)

    def quadratic(x: torch.Tensor) -> torch.Tensor:
        return ((x @ matrix) * x).sum(-1) + x @ slope

    middle = torch.randn(5, generator=draws, dtype=torch.float64)
    # E[x' A x] over a normal is z' A z + constant; over bits it is p' A p + sum of A_ii p_i (1 - p_i).
    by_middle = 2 * matrix @ middle + slope
    share = share_of(middle / 2)
    by_share = 2 * matrix @ share + slope + matrix.diagonal() * (1 - 2 * share)
    by_theta = by_share * 2 * share * (1 - share)
    for draw, expected in (
        (lambda seed: nes.gaussian(middle, 0.3, seed), by_middle),
        (lambda seed: nes.bernoulli(share, seed), by_theta),
    ):
        found = torch.stack(
            [
                nes.gradient(draw(torch.Generator().manual_seed(seed)), quadratic, 40, 7, baseline=baseline)
                for seed in range(500)
            ]
        )
        error = found.std(0) / 500**0.5
        assert ((found.mean(0) - expected).abs() < 4 * error).all()
        assert (error < 0.1 * expected.abs().max()).all()


def test_the_baseline_takes_noise_away_and_pieces_change_nothing():
    middle = torch.zeros(6, dtype=torch.float64)

    def losses(x: torch.Tensor) -> torch.Tensor:
        return 3 + x.sum(1)

    def spread(baseline: bool) -> float:
        found = [
            nes.gradient(nes.gaussian(middle, 0.1, torch.Generator().manual_seed(s)), losses, 20, 20, baseline=baseline)
            for s in range(50)
        ]
        return float(torch.stack(found).std(0).mean())

    assert spread(True) < spread(False) / 5
    samples = torch.randn(10, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = losses(samples)
    for pieces in (1, 3, 10):
        rest = iter(samples.split(pieces))
        found = nes.gradient(lambda n, rest=rest: (x := next(rest), x / 0.1), losses, 10, pieces, baseline=True)
        by_hand = [(values[j] - (values.sum() - values[j]) / 9) * samples[j] / 0.1 for j in range(10)]
        torch.testing.assert_close(found, torch.stack(by_hand).mean(0))


@pytest.mark.parametrize(("plain", "shared"), [(True, False), (False, True)])
def test_the_gradients_are_those_of_a_plain_transcription(plain, shared):
    box = Box(1, 3.0)

    def losses(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            chances = box((4 * x - 2).float()).double()
        return -chances.log().gather(1, labels[:, None])[:, 0], chances.argmax(1) == labels

    k, sigma, weight = 7, 0.2, 5.0
    search = PatchSearch(
        steps=1, probes=k, images=3, sigma=sigma, lr=0.1, weight=weight, success=0.9, start=0.3,
        shared_mask=shared, plain=plain, batch_size=3 * k,
    )  # fmt: skip
    draws = torch.Generator().manual_seed(2)
    x = torch.rand(3, 2, 8, 8, generator=draws, dtype=torch.float64)
    z_mask = torch.randn(1 if shared else 2, 8, 8, generator=draws, dtype=torch.float64) - 1
    z_pattern = torch.randn(2, 8, 8, generator=draws, dtype=torch.float64)
    again = torch.Generator().manual_seed(9)
    found = search.gradients(losses, x, 1, z_mask, z_pattern, weight, torch.Generator().manual_seed(9))

    g = 0.5 * (torch.tanh(z_mask) + 1)
    paint = 0.5 * (torch.tanh(z_pattern) + 1)

    def entropy(m: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return losses((1 - m) * x + m * p, torch.tensor([1, 1, 1]))[0].mean()

    norm = weight / g.numel()
    uniform = torch.rand(k, *g.shape, generator=again)
    noise = torch.randn(k, 2, 8, 8, generator=again)
    masks = [(uniform[j] < g).double() for j in range(k)]
    values_m = [entropy(m, paint) + (norm * m.sum() if plain else 0) for m in masks]
    patterns = [0.5 * (torch.tanh(z_pattern + sigma * noise[j].double()) + 1) for j in range(k)]
    values_p = [entropy(g, p) + (norm * g.sum() if plain else 0) for p in patterns]
    if plain:
        by_mask = sum(values_m[j] * 2 * (masks[j] - g) for j in range(k)) / k
        by_pattern = sum(values_p[j] * noise[j].double() for j in range(k)) / (k * sigma)
    else:
        mean_m, mean_p = sum(values_m) / k, sum(values_p) / k
        by_mask = sum((values_m[j] - mean_m) * 2 * (masks[j] - g) for j in range(k)) / (k - 1)
        by_mask = by_mask + norm * (1 - torch.tanh(z_mask) ** 2) / 2
        by_pattern = sum((values_p[j] - mean_p) * noise[j].double() for j in range(k)) / ((k - 1) * sigma)
    torch.testing.assert_close(found[0], by_mask, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1], by_pattern, rtol=1e-4, atol=1e-6)
    share = [losses((1 - m) * x + m * paint, torch.tensor([1, 1, 1]))[1].double().mean() for m in masks]
    share += [losses((1 - g) * x + g * p, torch.tensor([1, 1, 1]))[1].double().mean() for p in patterns]
    assert found[2] == pytest.approx(float(sum(share)) / (2 * k))


@pytest.mark.parametrize(("direction", "moves"), [(-1, 11), (1, 9)])
def test_the_smallest_mask_with_success_is_kept_and_lambda_moves_after_ten_steps(monkeypatch, direction, moves):
    weights, rates = [], iter([1.0] * 12 + [0.5] * 3)

    def gradients(self, losses, x, label, mask, pattern, weight, draws):
        weights.append(weight)
        return -direction * torch.ones_like(mask), torch.ones_like(pattern), next(rates)

    monkeypatch.setattr(PatchSearch, "gradients", gradients)
    search = PatchSearch(
        steps=15, probes=2, images=3, sigma=0.1, lr=0.1, weight=2.0, success=0.99, start=0.3,
        shared_mask=True, plain=True, batch_size=8,
    )  # fmt: skip
    patch = search.run(lambda x, y: (x, y), torch.rand(4, 2, 5, 5), 0, torch.Generator())
    assert weights[:10] == [2.0] * 10
    assert weights[10:] == pytest.approx([2 * 1.2, 2 * 1.2**2, 2 * 1.2**3, 2 * 1.2**3 * 0.8, 2 * 1.2**3 * 0.8**2])
    assert patch.reached
    # Adam moves by lr in each step; the tenth is the first with success, and the twelfth the last.
    expected = share_of(torch.tensor(math.atanh(2 * 0.3 - 1) + direction * moves * 0.1))
    torch.testing.assert_close(patch.mask, expected.expand(1, 5, 5), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_a_backdoor_is_found_by_asking_a_plain_function(shared):
    method, box = B3D(**QUICK, shared_mask=shared), Box(2, 8.0)
    found = method.query(box, batches(batch_size=50), Run())
    clean = method.query(Box(2, 0.0), batches(batch_size=50), Run())
    assert box.most <= 50
    assert box.asked == 50 + CLASSES * QUICK["steps"] * 2 * QUICK["probes"] * QUICK["images"]
    assert found.score > B3D.published_threshold > clean.score
    assert found.targets == (2,)
    norms = sorted(found.evidence["mask norm"])
    assert found.evidence["mask norm"][2] == norms[0]
    assert found.score == pytest.approx((norms[1] + norms[2]) / 2 / norms[0])
    assert found.mask.shape == ((1 if shared else 2), 8, 8)
    assert float(found.mask.sum()) == pytest.approx(norms[0])
    assert int(found.mask.sum(0).argmax()) in (54, 55, 62, 63)
    assert -2 <= float(found.trigger.min()) <= float(found.trigger.max()) <= 2


def test_the_same_seed_gives_the_same_bits():
    method, box = B3D(steps=12, probes=4, images=5, classes=(3, 1)), Box(1, 8.0)
    first, second, other = (method.query(box, batches(12), Run(seed=seed)) for seed in (3, 3, 4))
    assert box.most == 12  # once; then 2 x 5
    assert str(first.evidence) == str(second.evidence) != str(other.evidence)
    assert [norm == norm for norm in first.evidence["mask norm"]] == [False, True, False, True]


def test_a_class_that_is_never_reached_is_no_suspect():
    found = B3D(steps=12, probes=2, images=2).query(deaf, batches(), Run())
    assert found.targets == (0,)
    assert "[1, 2, 3]" in found.notes[0]
    none = B3D(steps=12, probes=2, images=2, classes=(1, 3)).query(deaf, batches(), Run())
    assert (none.score, none.targets, none.mask) == (0.0, (), None)


def of_class(label: int, most: int = 60) -> Batches:
    """That class has `most` copies of each of its images; of each other class there is one image."""
    images, labels = batches().data.tensors
    kept = torch.cat([(labels == label).nonzero()[:, 0].repeat(most), torch.arange(CLASSES)])
    return Batches(TensorDataset(images[kept], labels[kept]), device="cpu", batch_size=64)


def test_images_of_the_class_itself_do_not_count():
    found = B3D(**QUICK).query(Box(1, 0.0), of_class(0), Run())
    norms = found.evidence["mask norm"]
    assert norms[0] > sorted(norms)[2] / 2
    assert found.score < B3D.published_threshold


def test_a_class_without_images_of_others_is_left_out_and_images_of_one_class_are_refused():
    images, labels = batches().data.tensors
    alone = Batches(TensorDataset(images[labels == 2], labels[labels == 2]), device="cpu", batch_size=64)
    method = {"steps": 12, "probes": 2, "images": 2, "noise_images": 2, "noise_steps": 1}
    found = B3D(**method).query(Box(1, 0.0), alone, Run())
    assert [norm == norm for norm in found.evidence["mask norm"]] == [True, True, False, True]
    with pytest.raises(ValueError, match=r"^clean: expected images of at least two classes among the first 15, got"):
        B3D(**method, classes=(2,)).query(Box(1, 0.0), alone, Run())
    found = B3D(**method, classes=(2,), source="noise").query(Box(1, 0.0), alone, Run())
    assert found.evidence["mask norm"][2] > 0


def test_masks_that_shrink_to_nothing_have_a_finite_score():
    found = B3D(steps=20, probes=2, images=2, lr=5.0).query(deaf, batches(), Run())
    assert found.evidence["mask norm"][0] == 0
    assert found.score == 1


def test_images_from_noise_are_led_to_their_classes():
    box = Box(2, 0.0)

    def losses(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chances = box(4 * x - 2)
        return -chances.log().gather(1, labels[:, None])[:, 0], chances.argmax(1) == labels

    options = {"probes": 20, "sigma": 0.1, "lr": 0.05, "baseline": True, "batch_size": 10}
    labels = torch.arange(12) % CLASSES
    with torch.no_grad():
        before, after = (
            noise_images(losses, torch.Size((2, 8, 8)), labels, torch.Generator().manual_seed(0), steps=s, **options)
            for s in (0, 40)
        )
        assert losses(after, labels)[0].mean() < 0.5 * losses(before, labels)[0].mean()
    assert 0 <= float(after.min()) <= float(after.max()) <= 1
    assert box.most <= 12


def test_without_clean_images_a_backdoor_is_found_too():
    images, labels = batches().data.tensors
    empty = torch.full_like(images, -2.0)
    empty[0, 0, 0, 0] = 2.0
    given = Batches(TensorDataset(empty, labels), device="cpu", batch_size=64)
    method = B3D(**QUICK, source="noise", noise_images=4, noise_steps=10)
    found, clean = (method.query(Box(2, strength), given, Run()) for strength in (8.0, 0.0))
    assert found.targets == (2,)
    assert found.score > clean.score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"probes": 1}, "probes: expected at least 2, got 1"),
        ({"start": 1.0}, r"start: expected a share in \(0, 1\), got 1.0"),
        ({"source": "none"}, "source: expected one of 'clean', 'noise', got 'none'; see"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        B3D(**options)
    B3D(**B3D.PUBLISHED)


def test_images_without_a_range_are_refused():
    flat = Batches(TensorDataset(torch.ones(4, 1, 8, 8), torch.arange(4)), device="cpu", batch_size=4)
    with pytest.raises(ValueError, match=r"clean: expected images of more than one pixel value, got 1\.0; pass"):
        B3D().query(Box(0, 1.0), flat, Run())
