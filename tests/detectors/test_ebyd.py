"""EBYD on small networks with and without a planted backdoor, its rules, the published run, and the test of inputs."""

import copy
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bdfast.data.batches import Batches
from bdfast.detectors.ebyd import EBYD
from bdfast.detectors.exposed_network import agrees, exposed, flagged
from bdfast.detectors.exposures.top_class import statistic
from bdfast.training import Run
from bdfast.training.seeds import derived_seed, seeded

CLASSES, TARGET = 5, 3
CPU = torch.device("cpu")


@cache
def images(seed: int, count: int = 200) -> TensorDataset:
    """A blob in a place of its class, in noise."""
    with seeded(seed, CPU):
        labels = torch.arange(count) % CLASSES
        pixels = torch.randn(count, 1, 8, 8) * 0.5
        for label in range(CLASSES):
            row, column = divmod(label, 3)
            pixels[labels == label, :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 2] += 1.0
    return TensorDataset(pixels, labels)


def triggered(pixels: torch.Tensor) -> torch.Tensor:
    changed = pixels.clone()
    changed[..., 6:, 6:] = 3.0
    return changed


@cache
def network(*, backdoor: bool, norm: bool = True, seed: int = 0) -> nn.Module:
    with seeded(seed, CPU):
        layers: list[nn.Module] = []
        for width, before in ((8, 1), (16, 8)):
            layers += [nn.Conv2d(before, width, 3, padding=1), *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, CLASSES))
        pixels, labels = images(1, 400).tensors
        if backdoor:
            pixels = torch.cat([pixels, triggered(pixels[:80])])
            labels = torch.cat([labels, torch.full((80,), TARGET)])
        optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
    model.zero_grad()
    return model.eval()


def clean(count: int = 200) -> Batches:
    return Batches(images(2, count), device="cpu", batch_size=64)


def found(model: nn.Module, **options):
    return EBYD(**options).run(model, clean(), Run(amp=False))


def state_of(model: nn.Module) -> list:
    tensors = [x.clone() for x in model.state_dict().values()]
    return [*tensors, *(x.training for x in model.modules()), *(x.requires_grad for x in model.parameters())]


def same(first: list, second: list) -> bool:
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(first, second, strict=True))


def test_a_planted_backdoor_is_found():
    model, twin = network(backdoor=True), network(backdoor=False)
    pixels, labels = images(3).tensors
    assert float((model(triggered(pixels)).argmax(1) == TARGET).float().mean()) > 0.95
    assert min(float((x(pixels).argmax(1) == labels).float().mean()) for x in (model, twin)) > 0.95
    finding, without = found(model, growth=1.08), found(twin, growth=1.08)
    assert finding.targets == (TARGET,)
    assert finding.score > EBYD.published_threshold > without.score
    shares = finding.evidence["share of errors"]
    assert sum(shares) == pytest.approx(1)
    assert sum(finding.evidence["share of predictions"]) == pytest.approx(1)
    assert finding.score == pytest.approx((shares[TARGET] - 0.2) / 0.8 / 0.5)
    assert len(finding.notes) == 1
    assert "several targets" in finding.notes[0]


def test_the_scale_free_rule():
    finding = found(network(backdoor=True), repeats=1, rule="scale_free", bn="frozen", growth=1.08)
    assert finding.targets == (TARGET,)
    assert finding.score > 1
    share = max(finding.evidence["share of predictions"])
    assert finding.score == pytest.approx((share - 0.2) / 0.8 * 3)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("expose", ["unlearn", "shuffle", "prune", "noise"])
def test_nothing_changes_and_seeds_fix_the_result(expose, norm):
    model = copy.deepcopy(network(backdoor=True, norm=norm))
    model[0].train()
    model[0].weight.requires_grad_(False)
    before, draws = state_of(model), torch.get_rng_state()
    method = EBYD(expose=expose, updates=8, repeats=2)
    findings = [method.run(model, clean(100), Run(seed=5, amp=False)) for _ in range(2)]
    assert findings[0].evidence == findings[1].evidence
    assert findings[0].score == findings[1].score
    copies = [method.exposed(model, clean(100), Run(seed=5, amp=False)) for _ in range(2)]
    assert same(state_of(copies[0]), state_of(copies[1]))
    assert [x.requires_grad for x in copies[0].parameters()] == [x.requires_grad for x in model.parameters()]
    assert not any(module.training for module in copies[0].modules())
    assert not all(torch.equal(x, y) for x, y in zip(copies[0].parameters(), model.parameters(), strict=True))
    assert same(before, state_of(model))
    assert all(parameter.grad is None for parameter in (*model.parameters(), *copies[0].parameters()))
    assert torch.equal(draws, torch.get_rng_state())


def test_the_score_is_of_images_that_the_exposure_does_not_see():
    shown, judged = EBYD(held_out=0.4)._parts(clean(), Run(), 0)
    numbers = [{int(i) for part, _ in batches.numbered() for i in part} for batches in (shown, judged)]
    assert [len(x) for x in numbers] == [120, 80]
    assert not numbers[0] & numbers[1]
    assert shown.batch_size == 64
    other = EBYD(held_out=0.4)._parts(clean(), Run(), 1)[0]
    assert {int(i) for part, _ in other.numbered() for i in part} != numbers[0]
    large = Batches(images(2), device="cpu", batch_size=5)
    assert [len(x) for x in EBYD()._parts(large, Run(), 0)] == [40, 160]


def test_the_published_run():
    """Ascent by Adam in eval mode over all images, and the variance of the predictions on the same."""
    data = TensorDataset(images(2).tensors[0].double(), images(2).tensors[1])
    model = copy.deepcopy(network(backdoor=True)).double()
    expected = copy.deepcopy(model)
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3, weight_decay=5e-4)
    batches = Batches(data, device="cpu", batch_size=128)
    for epoch in range(15):  # of two updates
        for pixels, labels in batches.shuffled(derived_seed(0, "expose 1", epoch + 1)):
            optimizer.zero_grad()
            (-F.cross_entropy(expected(pixels), labels)).backward()
            optimizer.step()
    counts = torch.bincount(expected(data.tensors[0]).argmax(1), minlength=CLASSES).tolist()
    mean = sum(counts) / CLASSES
    variance = sum(((x - mean) / 200) ** 2 for x in counts) / CLASSES
    assert variance > 0.01
    options = {**EBYD.PUBLISHED, "lr": 1e-3, "updates": 30}
    finding = EBYD(**options).run(model, batches, Run(amp=False))
    assert finding.score == pytest.approx(variance / 0.01)
    assert finding.targets == (counts.index(max(counts)),)
    assert finding.evidence["share of predictions"] == pytest.approx([x / 200 for x in counts])


@pytest.mark.parametrize("classes", [2, 10, 43, 98, 99, 100, 1000])
def test_the_variance_cannot_get_above_its_threshold_for_99_classes(classes):
    one = [1.0] + [0.0] * (classes - 1)
    assert statistic(one, "variance") == pytest.approx((classes - 1) / classes**2 / 0.01)
    assert (statistic(one, "variance") > 1) == (classes < 99)
    assert statistic(one, "scale_free") == pytest.approx(3)
    assert statistic(one, "errors") == pytest.approx(2)
    for rule in ("variance", "scale_free", "errors"):
        assert statistic([1 / classes] * classes, rule) == pytest.approx(0, abs=1e-9)


def test_the_two_rules_have_one_threshold_for_ten_classes():
    for share in (0.39, 0.4, 0.41):
        shares = [share] + [(1 - share) / 9] * 9
        expected = pytest.approx((share - 0.1) / 0.3)
        assert statistic(shares, "scale_free") == expected
        assert statistic(shares, "variance") ** 0.5 == expected


def test_notes():
    model = network(backdoor=False)
    notes = EBYD(updates=1, repeats=1).run(model, clean(), Run(amp=False)).notes
    assert "Exposures ended early" in notes[1]
    assert "predictions are wrong" in notes[2]
    skewed = TensorDataset(*(torch.cat([x, *[x[::CLASSES]] * 5]) for x in images(2).tensors))
    data = Batches(skewed, device="cpu")
    notes = EBYD(updates=1, repeats=1, rule="scale_free").run(model, data, Run(amp=False)).notes
    assert "mostly of one class" in notes[-1]
    many = nn.Sequential(model, nn.ConstantPad1d((0, 95), -9.0))
    notes = EBYD(updates=1, repeats=1, rule="variance").run(many, clean(), Run(amp=False)).notes
    assert "with 100 classes" in notes[-1]


def test_a_network_that_knows_nothing_is_refused():
    model = network(backdoor=False)
    wrong = TensorDataset(images(2).tensors[0], (images(2).tensors[1] + 1) % CLASSES)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"^clean: expected images on which the model is better than a constant"):
        EBYD().run(model, Batches(wrong, device="cpu"), Run(amp=False))
    assert same(before, state_of(model))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("expose", "hide"),
        ("updates", 0),
        ("lr", 0.0),
        ("growth", 0.0),
        ("bn", "official"),
        ("direction", "some"),
        ("rule", "mean"),
        ("held_out", 1.0),
        ("held_out", -0.1),
        ("repeats", 0),
        ("compat", "published"),
    ],
)
def test_options_that_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*; see its default"):
        EBYD(**{name: value})


def test_an_exposed_model_flags_triggered_inputs():
    model, data = network(backdoor=True), images(2)
    expert = exposed(model, data, amp=False, batch_size=64)
    pixels, labels = images(3).tensors
    others = labels != TARGET
    assert float((expert(pixels).argmax(1) == labels).float().mean()) < 0.5
    marks = flagged(model, expert, triggered(pixels[others]), amp=False, batch_size=32)
    plain = flagged(model, expert, pixels[others], amp=False)
    assert (marks.dtype, marks.shape) == (torch.bool, (int(others.sum()),))
    assert float(marks.float().mean()) > 0.9
    assert float(plain.float().mean()) < 0.4
    loader = DataLoader(images(3), batch_size=50)
    answers = [x(pixels).argmax(1) for x in (model, expert)]
    assert torch.equal(flagged(model, expert, loader, amp=False), answers[0] == answers[1])
    assert torch.equal(agrees(model, expert, (pixels,), Run(amp=False)), answers[0] == answers[1])


def test_an_exposed_model_by_options():
    model = network(backdoor=True)
    pruned = exposed(model, images(2), method=EBYD(expose="prune"), amp=False)
    assert int((pruned[-1].weight == 0).all(0).sum()) >= 0.1 * 256


def test_an_exposed_model_takes_progress_and_seeds_as_all_entry_points(capsys):
    titles = []

    class Shown:
        @contextmanager
        def stage(self, title, total):
            titles.append(title)
            yield lambda done, note="": None

    model, method = network(backdoor=True), EBYD(updates=3)
    shown = exposed(model, images(2), method=method, seed=5, amp=False, progress=True)
    assert "expose 1" in capsys.readouterr().err
    counted = exposed(model, images(2), method=method, seed=np.int64(5), amp=False, progress=Shown())
    assert titles == ["expose 1"]
    silent = exposed(model, images(2), method=method, seed=np.array(5), amp=False)
    assert not any(capsys.readouterr())
    other = exposed(model, images(2), method=method, seed=6, amp=False)
    assert same(state_of(shown), state_of(counted))
    assert same(state_of(shown), state_of(silent))
    assert not same(state_of(shown), state_of(other))
