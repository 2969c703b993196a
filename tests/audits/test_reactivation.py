"""Reactivation against a plain transcription in float64, and what the perturbation may do."""

import copy

import pytest
import torch
from audit_cases import ATTACK, CLASSES, case_for, forgotten, same, state
from torch.nn import functional as F

import bdfast
from bdfast.audits import ReactivationAudit, RetuningAudit
from bdfast.audits.perturbation_network import DENSE, Behind, Convolutional, FullyConnected, Perturbed, network_for
from bdfast.audits.reactivation import OUR_FORM, PUBLISHED_FORM, reactivation_loss
from bdfast.data.images import to_float, to_uint8
from bdfast.training.seeds import derived_seed, seeded

SHORT = RetuningAudit(epochs=2, batch_size=32)


def logits(count: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(count, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("controlled", [True, False])
def test_the_loss(controlled):
    answers, wanted, seen = (logits(7, seed) for seed in range(3))
    labels = torch.arange(7) % CLASSES
    p, q = torch.exp(wanted), torch.exp(answers)
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    follow = sum(float((p[i] * (p[i].log() - q[i].log())).sum()) for i in range(7)) / 7
    judged, count = (seen, 7) if controlled else (answers, 4)
    s = torch.exp(judged) / torch.exp(judged).sum(1, keepdim=True)
    keep = -sum(float(s[i, labels[i]].log()) for i in range(count)) / count
    loss = reactivation_loss(answers, wanted, seen if controlled else None, labels, 0.2, untriggered=4)
    assert float(loss) == pytest.approx(0.2 * follow + keep, abs=1e-12)
    assert float(loss) > 0.1


def transcribed(audit, after, retuned, clean_model, images, labels, limits, count):
    """The first `count` steps, plain SGD with momentum."""
    network = FullyConnected(images.shape[1:], 32)
    eps = 16 / 255 * (limits[1] - limits[0])
    velocity = [torch.zeros_like(x, dtype=torch.float64) for x in network.parameters()]
    network.double()
    draws = torch.Generator().manual_seed(derived_seed(0, "reactivation", 1))
    for places in torch.randperm(len(images), generator=draws).split(audit.batch_size // 2)[:count]:
        x, y = images[places], labels[places]
        others = y != ATTACK.target
        both = torch.cat([x, to_float(to_uint8(ATTACK(x[others])))]).double()
        truth = torch.cat([y, y[others]])
        changed = (both + eps * torch.tanh(network(both))).clamp(*limits)
        kl = F.kl_div(after(changed).log_softmax(1), retuned(both).softmax(1), reduction="batchmean")
        if clean_model is None:
            loss = 0.2 * kl + F.cross_entropy(after(changed)[: len(x)], y)
        else:
            loss = 0.2 * kl + F.cross_entropy(clean_model(changed), truth)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for w, v, g in zip(network.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                w.sub_(0.1 * v)
    return network


@pytest.mark.parametrize("controlled", [True, False])
def test_the_published_steps(planted, innocent, clean, shown, controlled):
    after = forgotten(planted, clean)
    kept = state(after), state(innocent)
    audit = ReactivationAudit(images=48, epochs=1, batch_size=32, retuning=SHORT)
    model = innocent if controlled else None
    with case_for(planted, after, clean.subset(torch.arange(48)), shown, clean_model=model) as (case, run):
        perturbed, count = audit.fitted(case, run)
        retuned, _ = SHORT.retuned(case, run)
        images, labels = case.clean.data.batch(torch.arange(48))
        torch.manual_seed(derived_seed(0, "perturbation"))
        expected = transcribed(audit, after, retuned, model, images, labels, case.limits, count=3)
        torch.manual_seed(derived_seed(0, "perturbation"))
        start = FullyConnected(images.shape[1:], 32).double()
    assert count == 48
    for x, y in zip(perturbed.network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=0, atol=1e-9)
    moved = max(
        float((x - y).detach().abs().max()) for x, y in zip(start.parameters(), expected.parameters(), strict=True)
    )
    assert moved > 1e-5
    assert same(after, kept[0])
    assert same(innocent, kept[1])
    assert all(x.grad is None for x in (*after.parameters(), *innocent.parameters(), *retuned.parameters()))


def test_the_settings_of_the_script():
    audit = ReactivationAudit()
    published = {"alpha": 0.2, "images": 500, "epochs": 50, "lr": 0.1, "momentum": 0.9, "batch_size": 128}
    assert audit == ReactivationAudit(**published, eps=16 / 255, retuning=RetuningAudit())


@pytest.mark.parametrize("controlled", [True, False])
def test_the_result_says_which_form_it_is(planted, innocent, clean, shown, controlled):
    after = forgotten(planted, clean)
    audit = ReactivationAudit(epochs=1, retuning=SHORT)
    result = bdfast.audit(
        planted, after, clean, shown, clean_model=innocent if controlled else None, methods=audit, batch_size=32
    )
    finding = result.results["reactivation"]
    assert finding.form == (PUBLISHED_FORM if controlled else OUR_FORM)
    assert finding.form in " ".join(finding.sentences(result.after))
    assert (finding.clean_model is None) is not controlled
    assert result.p_asr == {"reactivation": finding.perturbed.rate}


def test_what_the_finding_measures(planted, clean, shown):
    """The rates are those of the network behind the perturbation, with the trigger and without."""
    audit = ReactivationAudit(epochs=1, retuning=SHORT)
    with case_for(planted, planted, clean, shown) as (case, run):
        finding = audit.run(case, run)
        perturbed, _ = audit.fitted(case, run)
    network = Behind(planted, perturbed)
    own = bdfast.evaluate(network, shown.data, shown)
    assert (finding.perturbed.acc, finding.perturbed.rate) == (own.acc, own.asr)
    images, labels = shown.data.batch(torch.arange(len(shown.data)))
    others = labels != ATTACK.target
    said = network(images[others].double()).argmax(1)
    assert finding.without_trigger.rate == float((said == ATTACK.target).double().mean())
    assert finding.by_itself == finding.without_trigger.rate


def test_the_trigger_may_be_brighter_than_all_images(planted, clean, shown):
    assert float(clean.images.max()) < 255
    with case_for(planted, planted, clean, shown) as (case, run):
        perturbed, _ = ReactivationAudit(epochs=1, retuning=SHORT).fitted(case, run)
    assert perturbed.limits == case.limits == (0, 1)
    assert perturbed.eps == 16 / 255
    with torch.no_grad():
        for x in perturbed.network.parameters():
            x.zero_()
    triggered = ATTACK(clean.batch(torch.arange(len(clean)))[0])
    assert torch.equal(perturbed(triggered), triggered)


def test_a_clean_label_attack_is_shown_as_it_is_used(planted, clean, shown, monkeypatch):
    """The perturbation is trained on images of the other classes, with the trigger of the test."""

    class Doubled(bdfast.BadNets):
        def poison(self, images, labels):
            return self(images).mul(0.5)

    attack = Doubled(size=2, target=0, clean_label=True)
    view = bdfast.Triggered(shown.data, attack)
    seen = []

    def spy(answers, wanted, seen_by_clean, labels, alpha, *, untriggered):
        seen.append(labels[untriggered:])
        return reactivation_loss(answers, wanted, seen_by_clean, labels, alpha, untriggered=untriggered)

    monkeypatch.setattr("bdfast.audits.reactivation.reactivation_loss", spy)
    audit = ReactivationAudit(images=32, epochs=1, batch_size=32, retuning=SHORT)
    with case_for(planted, planted, clean, view) as (case, run):
        images = []
        forward = run.forward
        run.forward = lambda model, batch: images.append(batch[0]) or forward(model, batch)
        SHORT.retuned(case, run)
        images.clear()
        audit.fitted(case, run)
    labels = torch.cat(seen)
    assert len(labels)
    assert (labels != attack.target).all()
    count = len(seen[0])
    assert (images[0][-count:, :, -2:, -2:] == 1).all()


def test_the_perturbation_is_small_and_stays_in_range():
    with seeded(0, torch.device("cpu")):
        images = 2 * torch.rand(5, 2, 8, 8) - 1
        network = FullyConnected((2, 8, 8), hidden=16)
        for x in network.parameters():
            x.data.mul_(50)
    network.requires_grad_(False)
    changed = Perturbed(network, 0.125, (-1.0, 1.0))(images)
    assert float((changed - images).abs().max()) == pytest.approx(0.125, rel=1e-3)
    assert float(changed.min()) >= -1
    assert float(changed.max()) <= 1
    assert changed.dtype == images.dtype
    assert Perturbed(copy.deepcopy(network), 0.125, (-1.0, 1.0))(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 224, 160), (1, 9, 13)])
def test_networks_for_images_of_any_size(shape):
    network = network_for(shape)
    assert isinstance(network, FullyConnected if shape[0] == 1 else Convolutional)
    assert network(torch.rand(2, *shape)).shape == (2, *shape)
    assert sum(x.numel() for x in network.parameters()) < 2 * 1024**2 + 2 * 1024 * DENSE + 10**6


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"eps": -1.0}, {"epochs": 0}, {"batch_size": 3}])
def test_wrong_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected .*, got .*; see its default"):
        ReactivationAudit(**options)
