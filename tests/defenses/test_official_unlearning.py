"""SAU and i-BAU: `compat="official"` against plain transcriptions of the published loops, and their losses, in float64.

The published code is BackdoorBench's, commit 3f4b1a92. Its optimizer for both is Adam with AMSGrad.
"""

import copy
import math
from collections import Counter

import pytest
import torch
from published_runs import assert_same, batches, purified
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bdfast.data.batches import Batches
from bdfast.defenses import IBAUDefense, SAUDefense
from bdfast.defenses.distillation import DistillationLoss
from bdfast.defenses.ibau import ImplicitLoss
from bdfast.defenses.loss import PreparedBatch
from bdfast.defenses.sau import SharedLoss
from bdfast.training import Run
from bdfast.training.seeds import seeded

BATCH = 4


def images() -> TensorDataset:
    """The least pixel is 0 and the greatest 1, so that shares of the range are pixel values."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(40, 1, 4, 4, dtype=torch.float64, generator=generator)
    pixels[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    return TensorDataset(pixels, torch.randint(3, (40,), generator=generator))


def network(strength: float = 1.0, dropout: float = 0.5) -> nn.Module:
    """Trained for a while, so that there are answers to lose: right ones, but for every seventh image.

    Logits are `strength` times what was learnt. With dropout, the mode of the network shows.
    """
    with seeded(0, torch.device("cpu")):
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(128, 3),
        ).double()
        pixels, labels = images().tensors
        learnt = (labels + (torch.arange(len(labels)) % 7 == 0)) % 3
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), learnt).backward()
            optimizer.step()
        with torch.no_grad():
            for parameter in model[-1].parameters():
                parameter *= strength
    model.zero_grad()
    return model.eval()


def assert_same_and_frozen(model: nn.Module, expected: nn.Module, start: nn.Module) -> None:
    """The statistics of BatchNorm are those of the start."""
    assert_same(model, expected, start)
    buffers = dict(start.named_buffers())
    assert all(torch.equal(x, buffers[name]) for name, x in model.named_buffers())


def divergences(logits: torch.Tensor, logits_ref: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon, class by class."""
    p, q = F.softmax(logits, 1).clamp(min=1e-8), F.softmax(logits_ref, 1).clamp(min=1e-8)
    m = 0.5 * (p + q)
    return 0.5 * (p * p.log() + q * q.log()) - 0.5 * (p * m.log() + q * m.log())


def shared_change(model, given, pixels, labels, seen: Counter) -> torch.Tensor:
    """The published search, which ends once all changes of a batch are shared. `seen` counts the cases met."""
    change = torch.full_like(pixels, 0.2, requires_grad=True)
    for step in range(5):
        plain, plain_ref = model(pixels).argmax(1), given(pixels).argmax(1)
        logits, logits_ref = model(pixels + change), given(pixels + change)
        led, led_ref = logits.argmax(1), logits_ref.argmax(1)
        success, success_ref = led != plain, led_ref != plain_ref
        shared = success & success_ref & (led == led_ref)
        adversarial = F.cross_entropy(logits, labels, reduction="none")[~success].sum()
        adversarial = adversarial + F.cross_entropy(logits_ref, labels, reduction="none")[~success_ref].sum()
        cross = divergences(logits, logits_ref)[~shared].sum() / len(pixels)
        gradient = torch.autograd.grad(0.01 * -adversarial / 2 / len(pixels) + cross, change)[0]
        change = (change.detach() - 0.2 * gradient.sign()).clamp(-0.2, 0.2).requires_grad_()
        # Without these cases the loop would look right whatever it did in them.
        seen["led apart"] += int((success & success_ref & (led != led_ref)).sum())
        seen["led one alone"] += int((success != success_ref).sum())
        if shared.all():
            seen["ended early"] += step < 4
            break
    else:
        seen["went to the end"] += 1
    return change.detach()


def published_shared_loss(changed: torch.Tensor, led: torch.Tensor, poison: torch.Tensor, count: int) -> torch.Tensor:
    """Of logits [B, K] on changed images and the classes [B] that the given network was led to."""
    is_led = F.one_hot(led, changed.shape[1])
    its = (F.softmax(changed, 1) * is_led).sum(1)[poison]
    of_others = (F.softmax(changed, 1) * (1 - is_led)).sum(1)[poison]
    first = -torch.log(1e-6 + of_others.clamp(max=0.999)).sum()
    second = -torch.log(1 + 1e-6 - its.clamp(min=0.001)).sum()
    return (first + second) / 2 / count


def test_sau():
    """Our search goes on where the published one ends, and moves nothing any more."""
    model, data, epochs, seen = network(), images(), 6, Counter()
    given, expected = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01, amsgrad=True)
    for pixels, labels in batches(data, BATCH, epochs):
        change = shared_change(expected, given, pixels, labels, seen)
        logits, changed = expected(torch.cat([pixels, pixels + change])).split(len(pixels))
        led = given(pixels + change).argmax(1)
        poison = (led != labels) & (led != given(pixels).argmax(1))
        loss = F.cross_entropy(logits, labels)
        if poison.any():
            loss = loss + published_shared_loss(changed, led, poison, len(pixels))
        seen["poison"] += int(poison.sum())
        seen["led from wrong to wrong"] += int(((led != labels) & ~poison).sum())
        seen["below the range"] += int((pixels + change < 0).sum())
        seen["above the range"] += int((pixels + change > 1).sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same_and_frozen(purified(model, data, SAUDefense, BATCH, lr=0.01, epochs=epochs), expected, model)
    assert len(seen) == 8
    assert min(seen.values()) > 0


def sau_loss(compat: str | None, model: nn.Module, limits: tuple[float, float] = (0.0, 1.0)) -> SharedLoss:
    sau = SAUDefense(compat=compat)
    given = copy.deepcopy(model)
    return SharedLoss(Run(amp=False), teacher=given, distill=0.0, overlay=0.0, model=model, sau=sau, limits=limits)


def test_avoiding_a_class_has_the_published_clamps():
    """A probability below a thousandth is as good as none, and one of almost 1 costs no more than log 1e6."""
    gaps = torch.tensor([-30.0, -7.0, -6.0, 0.0, 7.0, 12.0, 30.0, 1000.0], dtype=torch.float64)
    logits = torch.stack([gaps, torch.zeros_like(gaps), torch.full_like(gaps, -1.0)], 1).requires_grad_()
    classes, every = torch.zeros(len(gaps), dtype=torch.long), torch.ones(len(gaps), dtype=torch.bool)
    actual = sau_loss("official", network()).avoided(logits, classes)
    for index, value in enumerate(actual):
        expected = published_shared_loss(logits[index : index + 1], classes[:1], every[:1], 1)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    gradient = torch.autograd.grad(actual.sum(), logits, retain_graph=True)[0]
    expected = torch.autograd.grad(published_shared_loss(logits, classes, every, 1), logits)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)
    probabilities = logits.softmax(1)[:, 0]
    assert (probabilities < 1e-3).tolist() == [True, True] + 6 * [False]
    assert not gradient[:2].any()
    assert float(actual.detach().max()) == pytest.approx(math.log(1e6), rel=1e-3)


@pytest.mark.parametrize("compat", [None, "official"])
def test_the_changed_images_of_sau(compat):
    """Within the bound, a share of the range; in the sound form within the range too."""
    low, high, bound = -1.0, 3.0, 0.2 * 4
    pixels, labels = (x[:20] for x in images().tensors)
    pixels = low + (high - low) * pixels
    model = network()
    loss = sau_loss(compat, model, (low, high))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.sign()
    changed, same = loss.search((pixels, labels))
    assert torch.equal(same, labels)
    change = changed - pixels
    assert float(change.abs().max()) == pytest.approx(bound, abs=1e-12)
    assert float(change.min()) < 0 < float(change.max())
    outside = max(low - float(changed.min()), float(changed.max()) - high)
    assert (outside > 0.5) if compat else (outside < 1e-12)


def test_i_bau():
    """One Adam through all rounds; the images that it unlearns on have the change of the round in a part of them."""
    model, data, share = network(strength=0.1), images(), 0.6
    expected = copy.deepcopy(model)
    params = list(expected.parameters())
    optimizer = torch.optim.Adam(params, lr=0.01, amsgrad=True)
    # Stored once, in an order that the published loader draws.
    stored = list(Batches(data, device="cpu", batch_size=BATCH).ordered())
    for index in range(5):
        found = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
        ascent = torch.optim.SGD([found], lr=10)
        for pixels, _ in stored:
            error = F.cross_entropy(expected(pixels + found), expected(pixels).argmax(1))
            ascent.zero_grad()
            (-error + 0.001 * torch.norm(found) ** 2).backward()
            ascent.step()
        change = found.detach()[0].requires_grad_()
        for pixels, labels in batches(data, BATCH, 1, f"fine-tune, round {index + 1}"):
            patching = torch.zeros_like(pixels)
            patching[torch.randperm(len(pixels))[: int(share * len(pixels))]] = change
            outer = F.cross_entropy(expected(pixels + patching), labels)
            toward = torch.autograd.grad(outer, change, retain_graph=True)[0]
            errors = F.cross_entropy(expected(stored[0][0] + change), stored[0][1], reduction="none")
            inner = torch.mean(-errors) + 0.001 * torch.norm(change) ** 2
            mapped = change - 0.1 * torch.autograd.grad(inner, change, create_graph=True)[0]
            v = torch.zeros_like(change)
            for _ in range(5):
                v = torch.autograd.grad(mapped, change, v, retain_graph=True)[0] + toward
            direct, implicit = torch.autograd.grad(outer, params), torch.autograd.grad(mapped, params, v)
            for parameter, *parts in zip(params, direct, implicit, strict=True):
                parameter.grad = sum(parts)
            optimizer.step()
    assert_same_and_frozen(purified(model, data, IBAUDefense, BATCH, lr=0.01, changed_share=share), expected, model)


@pytest.mark.parametrize(("compat", "distill"), [("official", 0.0), (None, 0.0), (None, 0.9)])
def test_the_gradient_of_the_implicit_loss_is_the_hypergradient(compat, distill):
    """With the derivatives of the step of the search as matrices: J in the change, D in the weights.

    After K steps from zero v is (1 + J + ... + J^(K-1)) g, and the gradient is that of the loss plus D v.
    """
    run, model, steps = Run(amp=False), network(strength=0.1, dropout=0.0).train(), 4
    teacher = network()
    (first, batch), labels = (x[:24].split(12) for x in images().tensors)
    first, batch = zip((first, batch), labels, strict=True)
    generator = torch.Generator().manual_seed(0)
    change = 0.3 * torch.randn(1, 4, 4, dtype=torch.float64, generator=generator)
    options = {"teacher": teacher, "distill": distill, "overlay": 0.0}
    ibau = IBAUDefense(compat=compat, changed_share=0.5, iterations=steps)
    loss = ImplicitLoss(run, **options, ibau=ibau, limits=(0.0, 1.0), found={"change": change, "batch": first})
    prepared = loss.prepare(batch)
    assert int(prepared.beside.sum()) == 6
    result = loss(model, prepared)
    result.loss.backward()

    if compat:
        model.eval()
    params, change = list(model.parameters()), change.clone().requires_grad_()

    def add(pixels: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        return pixels + to * change if compat else (pixels + to * change).clamp(0, 1)

    on_some = PreparedBatch((add(batch[0], prepared.beside), batch[1]), prepared.kept)
    outer = DistillationLoss(run, **options)(model, on_some).loss
    g, *direct = torch.autograd.grad(outer, [change, *params])
    pixels, labels = first if compat else batch
    inner = 0.001 * change.square().sum() - F.cross_entropy(model(add(pixels, torch.ones(1))), labels)
    moved = (change - 0.1 * torch.autograd.grad(inner, change, create_graph=True)[0]).flatten()
    rows = [torch.autograd.grad(x, [change, *params], retain_graph=True) for x in moved]
    jacobian = torch.stack([row[0].flatten() for row in rows])
    v = sum(torch.linalg.matrix_power(jacobian.T, k) for k in range(steps)) @ g.flatten()
    for index, parameter in enumerate(params):
        implicit = sum(weight * row[index + 1] for weight, row in zip(v, rows, strict=True))
        torch.testing.assert_close(parameter.grad, direct[index] + implicit, rtol=1e-9, atol=1e-12)
    # What the fixed point adds is not lost in the rest.
    assert float((model[-1].weight.grad - direct[-2]).norm() / direct[-2].norm()) > 0.01
    torch.testing.assert_close(result.loss, outer, rtol=1e-12, atol=0)


@pytest.mark.parametrize("cls", [SAUDefense, IBAUDefense])
def test_passes_on_changed_images_leave_no_trace_in_the_statistics(cls):
    """Nor do they come between a pass and its gradient."""
    model, data, stage = network(), images(), "fine-tune"
    changes = {"lr": 1e-12, "epochs": 1, "bn": "at_theta", "compat": None}
    if cls is IBAUDefense:
        stage, changes = "fine-tune, round 1", {**changes, "rounds": 1, "changed_share": 0.0}
    actual = purified(model, data, cls, BATCH, **changes)[1]
    expected = copy.deepcopy(model).train()
    for pixels, _ in batches(data, BATCH, 1, stage):
        expected(pixels)
    torch.testing.assert_close(actual.running_mean, expected[1].running_mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(actual.running_var, expected[1].running_var, rtol=0, atol=1e-9)
    assert float((actual.running_mean - model[1].running_mean).abs().max()) > 1e-3
