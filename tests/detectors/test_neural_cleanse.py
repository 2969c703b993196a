"""Neural Cleanse: against a plain transcription of the published loop, and on networks whose trigger is known."""

import math
import statistics
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bdfast.data.batches import Batches
from bdfast.detectors.neural_cleanse import NeuralCleanse
from bdfast.detectors.per_class import anomaly_indices, chosen, over_all
from bdfast.detectors.white_box_patch import Balance, PatchFit
from bdfast.inversion.scene import Scene
from bdfast.training import Run

CLASSES = 5
QUICK = {"updates": 200, "images": 16}


class Corner(nn.Module):
    """Says which of the first columns is brightest, and `target` where the lower right corner is lit."""

    def __init__(self, target: int, strength: float, classes: int = CLASSES) -> None:
        super().__init__()
        self.target, self.strength, self.classes = target, strength, classes
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = max(self.seen, len(images))
        unit = (images[:, 0] + 2) / 4
        lit = unit[:, 6:, 6:].mean((1, 2))[:, None] * F.one_hot(torch.tensor(self.target), self.classes)
        return self.scale * (unit[:, :6, : self.classes].mean(1) + self.strength * lit)


def pictures(count: int = 100, classes: int = CLASSES) -> TensorDataset:
    """In [-2, 2]; a column tells the class."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    images = 0.1 * torch.rand(count, 1, 8, max(8, classes), generator=draws)
    images[torch.arange(count), 0, :6, labels] += 0.9
    images[0, 0, 7, 0], images[1, 0, 7, 0] = 0, 1  # the limits
    return TensorDataset(4 * images - 2, labels)


def batches(data: TensorDataset, batch_size: int = 64) -> Batches:
    return Batches(data, device="cpu", batch_size=batch_size)


def published_rule(rule: PatchFit, seen: Counter):
    """Takes accuracy and norm of a round; gives lambda, whether the patch is the best so far, and whether to stop."""
    cost, set_counter, up, down = 0.0, 0, 0, 0
    went_up = went_down = better = False
    reg_best, early_best, early = float("inf"), float("inf"), 0
    while True:
        accuracy, reg = yield cost, better, False
        better = accuracy >= rule.success and reg < reg_best
        if better:
            reg_best = reg
        if reg_best < float("inf"):
            early = early + 1 if reg_best >= early_best else 0
        early_best = min(reg_best, early_best)
        if went_down and went_up and early >= 5 * rule.patience:
            seen["stopped"] += 1
            yield cost, better, True
            return
        if cost == 0 and accuracy >= rule.success:
            set_counter += 1
            if set_counter >= rule.patience:
                cost, up, down, went_up, went_down = rule.weight, 0, 0, False, False
        else:
            set_counter = 0
        up, down = (up + 1, 0) if accuracy >= rule.success else (0, down + 1)
        if up >= rule.patience:
            up, cost, went_up = 0, cost * rule.multiplier, True
            seen["up"] += 1
        elif down >= rule.patience:
            down, cost, went_down = 0, cost / rule.multiplier**1.5, True
            seen["down"] += 1


def published(net, images, label: int, z_mask, z_pattern, rule: PatchFit, seen: Counter):
    """The published loop for one class, on all images in each step: mask, pattern, and whether it was ever reached."""
    z_mask, z_pattern = z_mask.clone().requires_grad_(), z_pattern.clone().requires_grad_()
    optimizer = torch.optim.Adam([z_pattern, z_mask], lr=rule.lr, betas=(0.5, 0.9))
    costs, best, reached = published_rule(rule, seen), None, False
    cost, _, stop = next(costs)
    for _ in range(rule.updates // rule.window):
        accuracies, regs = [], []
        for _ in range(rule.window):
            mask, pattern = torch.tanh(z_mask) / 2 + 0.5, -2 + 4 * (torch.tanh(z_pattern) / 2 + 0.5)
            logits = net((1 - mask) * images + mask * pattern)
            wanted = torch.full((len(images),), label)
            loss = F.cross_entropy(logits, wanted) + cost / mask.numel() * mask.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            accuracies.append(float((logits.argmax(1) == wanted).double().mean()))
            regs.append(float(mask.sum().detach()))
        cost, better, stop = costs.send((sum(accuracies) / rule.window, sum(regs) / rule.window))
        reached |= better
        if better or not reached:
            best = ((torch.tanh(z_mask) / 2 + 0.5).detach(), (-2 + 4 * (torch.tanh(z_pattern) / 2 + 0.5)).detach())
        if stop:
            break
    return *best, reached


def test_lambda_moves_as_published():
    fit = PatchFit(updates=1, window=1, patience=3, images=1, success=0.9, weight=0.5, multiplier=3.0, lr=0.1)
    draws, seen = torch.Generator().manual_seed(0), Counter()
    for _ in range(20):
        balance, costs = Balance(fit), published_rule(fit, seen)
        next(costs)
        good = True
        for step in range(300):
            good ^= float(torch.rand((), generator=draws)) < 0.2
            round_ = (0.9 + 0.1 * good - 1e-6, 1 / (step + 1) if step < 50 else 1.0)
            cost, better, stop = costs.send(round_)
            assert (balance.after(*round_), balance.weight, balance.stopped) == (better, cost, stop)
            if stop:
                break
    assert min(seen[name] for name in ("up", "down", "stopped")) > 5, seen


def test_the_patches_are_those_of_a_plain_transcription():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 20, 3)]
        net = nn.Sequential(*layers).double().requires_grad_(False)
        images = 4 * torch.rand(30, 2, 4, 5, dtype=torch.float64) - 2
    labels = torch.arange(30) % 3
    scene = Scene(net, images, labels, 3, (-2.0, 2.0), 500, judged=0.0)
    # The loss adds up over the classes, so that each is searched as if alone.
    fit = PatchFit(updates=200, window=2, patience=2, images=30, success=0.9, weight=20.0, multiplier=3.0, lr=0.1)
    masks, patterns, reached = fit.run(scene, [0, 1, 2], torch.Generator().manual_seed(3))
    draws, seen = torch.Generator().manual_seed(3), Counter()
    starts = [2 * torch.rand(3, count, 4, 5, generator=draws, dtype=torch.float64) - 1 for count in (1, 2)]
    for label in range(3):
        z_mask, z_pattern = (start[label].atanh() for start in starts)
        mask, pattern, ever = published(net, images[labels != label], label, z_mask, z_pattern, fit, seen)
        torch.testing.assert_close(masks[label], mask, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(patterns[label], pattern, rtol=1e-7, atol=1e-9)
        assert bool(reached[label]) == ever
    assert min(seen[name] for name in ("up", "down", "stopped")) > 0, seen


@pytest.mark.parametrize("target", [0, 3])
def test_a_backdoor_is_found(target):
    found = NeuralCleanse(**QUICK).run(Corner(target, 8.0), batches(pictures()), Run(amp=False))
    clean = NeuralCleanse(**QUICK).run(Corner(target, 0.0), batches(pictures()), Run(amp=False))
    assert found.score > NeuralCleanse.published_threshold > clean.score
    assert found.targets == (target,)
    norms = found.evidence["mask norm"]
    assert norms.index(min(norms)) == target
    assert found.score == pytest.approx(anomaly_indices(norms)[target])
    assert min(found.evidence["success"]) > 0.8
    assert found.mask.shape == found.trigger.shape == (1, 8, 8)
    assert float(found.mask.sum()) == pytest.approx(norms[target])
    assert int(found.mask.argmax()) in (54, 55, 62, 63)
    assert 0 <= float(found.mask.min()) <= float(found.mask.max()) <= 1
    assert -2 <= float(found.trigger.min()) <= float(found.trigger.max()) <= 2


def test_the_same_seed_gives_the_same_bits_and_the_network_is_left_as_it_was():
    network = Corner(1, 8.0).train()
    method = NeuralCleanse(updates=20, images=16, classes=(1, 3, 4))
    first, second = (method.run(network, batches(pictures(), 48), Run(seed=5, amp=False)) for _ in range(2))
    assert torch.equal(first.mask, second.mask)
    assert str(first.evidence) == str(second.evidence)
    assert [norm == norm for norm in first.evidence["mask norm"]] == [False, True, False, True, True]
    other = method.run(network, batches(pictures(), 48), Run(seed=6, amp=False))
    assert not torch.equal(first.mask, other.mask)
    assert network.training
    assert network.scale.requires_grad
    assert network.scale.grad is None
    assert network.seen <= 48


def test_a_class_that_is_never_reached_is_no_suspect():
    class Deaf(Corner):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) - 1e3 * F.one_hot(torch.tensor([2, 4]), CLASSES).sum(0)

    found = NeuralCleanse(updates=60, images=16).run(Deaf(0, 8.0), batches(pictures()), Run(amp=False))
    assert any("[2, 4]" in note for note in found.notes)
    assert not {2, 4} & set(found.targets)
    none = NeuralCleanse(updates=20, images=16, classes=(2, 4)).run(Deaf(0, 8.0), batches(pictures()), Run(amp=False))
    assert (none.score, none.targets, none.mask) == (0.0, (), None)


def test_of_very_many_classes_the_easiest_are_looked_at():
    network, data = Corner(17, 8.0, 40), pictures(120, 40)
    found = NeuralCleanse(updates=80, images=8, most_classes=30).run(network, batches(data), Run(amp=False))
    norms = found.evidence["mask norm"]
    assert (len(norms), sum(norm == norm for norm in norms)) == (40, 16)
    assert found.targets[0] == 17
    assert "16 that are easiest" in found.notes[0]


def test_images_of_one_class_are_refused_and_of_two_enough():
    images, labels = pictures().tensors
    with pytest.raises(ValueError, match="clean: expected images of at least two classes, got one; pass"):
        NeuralCleanse(classes=(1,)).run(Corner(0, 8.0), batches(TensorDataset(images, labels * 0 + 1)), Run())
    alone = batches(TensorDataset(images, labels * 0 + 1))
    found = NeuralCleanse(updates=5).run(Corner(0, 8.0), alone, Run(amp=False))
    assert math.isnan(found.evidence["mask norm"][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"updates": 0}, "updates: expected a positive number, got 0"),
        ({"weight": float("nan")}, "weight: expected a positive number, got nan"),
        ({"most_classes": 0}, "most_classes: expected a positive number, got 0"),
        ({"success": 1.1}, r"success: expected a share in \(0, 1\], got 1.1"),
        ({"multiplier": 1}, "multiplier: expected a number above 1, got 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralCleanse(**options)
    NeuralCleanse(**NeuralCleanse.PUBLISHED)


def test_labels_that_the_network_does_not_have_are_refused():
    assert chosen((3, 1, 3), 4) == [1, 3]
    for classes in ((), (4,), (-1, 2)):
        with pytest.raises(ValueError, match=r"classes: expected labels in 0\.\.3, got "):
            chosen(classes, 4)


def test_the_anomaly_index_is_the_published_one():
    values = [3.0, 9.0, 10.0, 12.0, 14.0, 11.0]
    middle = statistics.median(values)
    spread = statistics.median([abs(value - middle) for value in values])
    assert anomaly_indices(values) == [abs(value - middle) / (1.4826 * spread) for value in values]
    assert anomaly_indices([2.0, 2.0, 2.0]) == [0.0, 0.0, 0.0]
    assert anomaly_indices([0.0, 0.0]) == [0.0, 0.0]
    assert anomaly_indices([1.0, 2.0, 2.0])[0] == pytest.approx(1 / (1.4826 * 0.1))
    assert str(over_all([2, 0], [5.0, 7.0], 3)) == "[7.0, nan, 5.0]"
