"""`compat="official"` and `bn="official"` against plain transcriptions of the published loops."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast.data.batches import Batches
from bdfast.defenses import FTSAMDefense, PAMDefense, TSBDDefense
from bdfast.training import Run
from bdfast.training.seeds import derived_seed, seeded

EPS = 1e-12
BATCH = 8


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


@pytest.fixture
def clean():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 4, 4, dtype=torch.float64, generator=generator)
    return Batches(TensorDataset(images, torch.randint(3, (40,), generator=generator)), device="cpu", batch_size=BATCH)


def batches(clean: Batches, epochs: int):
    for epoch in range(1, epochs + 1):
        yield from clean.shuffled(derived_seed(0, "fine-tune", epoch))


def fine_tuned(defense, clean: Batches, change=None) -> nn.Module:
    model = network()
    run = Run(amp=False)
    with seeded(0, clean.device):
        defense.fine_tune(model, copy.deepcopy(model), clean, run, "fine-tune", change=change)
    return model


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-8, msg=name)


def kept_out_of_batchnorm(model: nn.Module, momentum: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


def test_ft_sam(clean):
    """Adaptive, the learning rate a cosine of the steps that starts anew, weights restored by subtraction."""
    expected, epochs, lr, rho = network().train(), 45, 0.01, 2.0  # 225 steps: past the turn at 200
    params = list(expected.parameters())
    optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for images, labels in batches(clean, epochs):
        optimizer.zero_grad()
        F.cross_entropy(expected(images), labels, label_smoothing=0.1).backward()
        with torch.no_grad():
            norm = torch.norm(torch.stack([(p.abs() * p.grad).norm() for p in params]))
            steps = [p.pow(2) * p.grad * rho / (norm + EPS) for p in params]
            for p, e in zip(params, steps, strict=True):
                p.add_(e)
        kept_out_of_batchnorm(expected, 0)
        optimizer.zero_grad()
        F.cross_entropy(expected(images), labels, label_smoothing=0.1).backward()
        kept_out_of_batchnorm(expected, 0.1)
        with torch.no_grad():
            for p, e in zip(params, steps, strict=True):
                p.sub_(e)
        optimizer.step()
        schedule.step()
    options = {**FTSAMDefense.PUBLISHED, "epochs": epochs}
    assert_same(fine_tuned(FTSAMDefense(rho=rho, **options), clean), expected)
    # The turn shows: after the first hundred steps the rate rises again, to where it was.
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * (1 + math.cos(math.pi * 25 / 100)) / 2)


def test_ft_sam_has_a_radius_that_follows_the_learning_rate(clean):
    defense = FTSAMDefense(rho=2.0, rho_min=0.5, epochs=4)
    seen = []
    original = FTSAMDefense.before_step

    def watched(self, optimizer):
        original(self, optimizer)
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["rho"]))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FTSAMDefense, "before_step", watched)
        fine_tuned(defense, clean)
    assert len(seen) == 20
    assert all(rho == pytest.approx(0.5 + 1.5 * lr / 0.1) for lr, rho in seen)
    assert seen[0] == (0.1, 2.0)
    assert seen[-1][1] < 1


def test_pam(clean):
    """One pass at w + rho d / ||d||, which moves the statistics; momentum 0.1, a constant rate."""
    expected, epochs = network().train(), 6
    backdoored = copy.deepcopy(expected)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.01, momentum=0.1)
    for images, labels in batches(clean, epochs):
        optimizer.zero_grad()
        pairs = list(zip(expected.parameters(), backdoored.parameters(), strict=True))
        with torch.no_grad():
            norm = torch.norm(torch.stack([(b - p).norm() for p, b in pairs]))
            old = [p.clone() for p, _ in pairs]
            for p, b in pairs:
                p.add_(0.5 * (b - p) / (norm + EPS))
        F.cross_entropy(expected(images), labels).backward()
        with torch.no_grad():
            for (p, _), before in zip(pairs, old, strict=True):
                p.copy_(before)
        optimizer.step()
    options = {**PAMDefense.PUBLISHED, "epochs": epochs}
    assert_same(fine_tuned(PAMDefense(**options), clean), expected)


def test_pam_changes_as_many_images_as_published_and_no_label(clean):
    class Negative(nn.Module):
        def forward(self, images):
            return -images

    inversion = bdfast.Inversion(Negative(), torch.ones(1), "", 0, [])
    images, labels = next(clean.ordered())
    for share, count in ((0.2, int(0.2 * BATCH + 1)), (0.0, 0), (1.0, BATCH)):
        with seeded(0, clean.device):
            changed, same = PAMDefense(triggered_share=share)._triggering(inversion)((images, labels))
        assert torch.equal(same, labels)
        assert int((changed == -images).flatten(1).all(1).sum()) == count
        assert int((changed == images).flatten(1).all(1).sum()) == BATCH - count


def test_pam_leaves_the_generator_as_the_first_round_made_it(clean, monkeypatch):
    calls = []

    def inverted(self, model, data, run, stage="invert", start=None):
        calls.append((stage, self.detect, start))
        return bdfast.Inversion(nn.Identity(), torch.ones(1), "", 2, [0.0])

    monkeypatch.setattr(bdfast.BTIDBF, "run", inverted)
    for compat, expected in (
        ("official", [("invert", "histogram")]),
        (None, [("invert", "scan"), ("invert 2", "scan")]),
    ):
        calls.clear()
        outcome = PAMDefense(rho=0.1, rounds=2, epochs=1, compat=compat).run(network(), clean, Run(amp=False))
        assert [(stage, detect) for stage, detect, _ in calls] == expected
        assert all((start is None) == (stage == "invert") for stage, _, start in calls)
        assert outcome.found["target"] == 2


def test_tsbd(clean):
    """Both passes on a copy, a third at the new weights that alone moves the statistics, gradients mixed per tensor."""
    expected, epochs, rho, alpha = network().train(), 5, 0.05, 0.7
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.01, momentum=0.9)
    for images, labels in batches(clean, epochs):
        neighbour = copy.deepcopy(expected)
        neighbour.zero_grad()
        F.cross_entropy(neighbour(images), labels).backward()
        first = [p.grad.clone() for p in neighbour.parameters()]
        with torch.no_grad():
            for p, g in zip(neighbour.parameters(), first, strict=True):
                p.add_(rho * g / g.norm())
        neighbour.zero_grad()
        F.cross_entropy(neighbour(images), labels).backward()
        optimizer.zero_grad()
        for p, q, g in zip(expected.parameters(), neighbour.parameters(), first, strict=True):
            p.grad = (1 - alpha) * g + alpha * q.grad
        optimizer.step()
        with torch.no_grad():
            expected(images)
    defense = TSBDDefense(rho=rho, alpha=alpha, **{**TSBDDefense.PUBLISHED, "epochs": epochs})
    assert_same(fine_tuned(defense, clean), expected)
