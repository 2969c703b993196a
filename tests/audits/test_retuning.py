"""Retuning against a plain transcription; poisoned batches; what the finding says."""

import copy
from dataclasses import replace

import pytest
import torch
from audit_cases import ATTACK, CLASSES, case_for, forgotten, pictures, same, stale, state
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bdfast
from bdfast.audits import RetuningAudit
from bdfast.audits.triggers import AttackTrigger, Poisoned
from bdfast.data.batches import Batches
from bdfast.data.images import to_float, to_uint8
from bdfast.training.seeds import derived_seed


def transcribed(model, images, labels, chosen, *, lr, momentum, epochs, size):
    """The published loop, in our order of the images: plain SGD with momentum on all parameters."""
    model = copy.deepcopy(model).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    images, labels = images.clone(), labels.clone()
    images[chosen] = to_float(to_uint8(ATTACK(images[chosen])))
    labels[chosen] = ATTACK.target
    velocity = [torch.zeros_like(x) for x in model.parameters()]
    updates = 0
    for epoch in range(1, epochs + 1):
        draws = torch.Generator().manual_seed(derived_seed(0, "retuning after", epoch))
        for places in torch.randperm(len(images), generator=draws).split(size):
            loss = F.cross_entropy(model(images[places].double()), labels[places])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for x, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                    v.mul_(momentum).add_(g)
                    x.sub_(lr * v)
            updates += 1
    return model.eval(), updates


def test_the_published_run(planted, clean, shown):
    after = forgotten(planted, clean)
    kept = state(after)
    audit = RetuningAudit(poisons=5, lr=0.02, epochs=3, batch_size=32)
    with case_for(planted, after, clean, shown) as (case, run):
        data = audit.poisoned(case, run)
        model, curve = audit.retuned(case, run)
        finding = audit.run(case, run)
    images, labels = clean.batch(torch.arange(len(clean)))
    assert len(data.chosen) == 5
    assert (labels[data.chosen] != ATTACK.target).all()
    expected, updates = transcribed(after, images, labels, data.chosen, lr=0.02, momentum=0.9, epochs=3, size=32)
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, expected.state_dict()[name], rtol=0, atol=1e-9)
    assert max(float((x - kept[name]).abs().max()) for name, x in model.named_parameters()) > 1e-3
    assert same(after, kept)
    assert [n for n, _ in curve] == [0, 3, 6, 9]
    assert finding.updates == updates == 9
    own = bdfast.evaluate(expected, shown.data, shown)
    assert finding.p_rate == own.asr
    assert curve[-1][1].acc == own.acc
    assert curve[0][1].rate == bdfast.evaluate(after, shown.data, shown).asr


def test_the_settings_of_the_script():
    audit = RetuningAudit()
    published = {"images": 1000, "poisons": 5, "lr": 0.01, "momentum": 0.9, "epochs": 5, "batch_size": 128}
    assert audit == RetuningAudit(**published)


def test_fewer_images_are_drawn(planted, clean, shown):
    with case_for(planted, planted, clean, shown) as (case, run):
        data = RetuningAudit(images=20).poisoned(case, run)
        finding = RetuningAudit(images=20, epochs=1).run(case, run)
    assert len(data) == finding.images == 20
    assert finding.poisons == 5


def test_a_clean_network_is_the_control(planted, clean, shown, innocent):
    result = bdfast.audit(planted, stale(planted), clean, shown, clean_model=innocent, methods="retuning")
    finding = result.results["retuning"]
    assert finding.control[0][1].rate == 0
    assert result.back == ["retuning"]
    learned = replace(finding, control=((0, finding.control[0][1]), finding.curve[-1]))
    assert learned.by_itself == finding.p_rate
    assert replace(result, results={"retuning": learned}).status == "no sign"
    assert "A clean network gets to" in " ".join(finding.sentences(result.after))


@pytest.mark.parametrize("loader", [False, True])
def test_poisoned_batches(clean, shown, loader):
    images, labels = clean.batch(torch.arange(len(clean)))
    data = DataLoader(TensorDataset(images, labels), batch_size=7) if loader else clean
    batches = Batches(data, device="cpu", batch_size=7)
    poisoned = Poisoned(batches, AttackTrigger(shown), 6, seed=0)
    seen = 0
    for numbers, (x, y) in poisoned.numbered():
        bad = torch.isin(numbers, poisoned.chosen)
        seen += int(bad.sum())
        assert torch.equal(x[~bad], images[numbers[~bad]])
        assert torch.equal(y[~bad], labels[numbers[~bad]])
        assert torch.equal(x[bad], to_float(to_uint8(ATTACK(images[numbers[bad]]))))
        assert (y[bad] == ATTACK.target).all()
    assert seen == 6
    assert torch.equal(clean.batch(torch.arange(len(clean)))[0], images)
    shuffled = torch.cat([y for _, y in poisoned.shuffled(3)])
    assert int((shuffled == ATTACK.target).sum()) == len(clean) // CLASSES + 6


def test_a_clean_label_attack_poisons_its_own_class(clean):
    attack = bdfast.BadNets(size=2, target=1, clean_label=True)
    trigger = AttackTrigger(bdfast.Triggered(pictures(20, seed=3), attack))
    poisoned = Poisoned(Batches(clean, device="cpu"), trigger, 100, seed=0)
    assert torch.equal(poisoned.chosen, (clean.labels == 1).nonzero().squeeze(1))


def test_a_network_with_integer_parameters(planted, clean, shown):
    after = forgotten(planted, clean)
    after.steps = torch.nn.Parameter(torch.tensor([3, 4]), requires_grad=False)
    with case_for(planted, after, clean, shown) as (case, run):
        model, curve = RetuningAudit(epochs=1, batch_size=32).retuned(case, run)
    assert torch.equal(model.steps, torch.tensor([3, 4]))
    assert not torch.equal(model[0].weight, after[0].weight)
    assert curve[-1][0] == 3


def test_nothing_that_can_be_poisoned(clean, shown):
    target_only = clean.subset((clean.labels == ATTACK.target).nonzero().squeeze(1))
    with pytest.raises(ValueError, match="clean: expected images that can be poisoned"):
        Poisoned(Batches(target_only, device="cpu"), AttackTrigger(shown), 5, seed=0)


@pytest.mark.parametrize("options", [{"poisons": 0}, {"lr": 0.0}, {"epochs": 0}, {"batch_size": 1}, {"momentum": 1.5}])
def test_wrong_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected .*, got .*; see its default"):
        RetuningAudit(**options)


def test_same_seed_same_bits(planted, clean, shown):
    models = []
    for state_of_torch in (1, 2):
        torch.manual_seed(state_of_torch)
        with case_for(planted, planted, clean, shown) as (case, run):
            models.append(RetuningAudit(images=40, epochs=1, batch_size=16).retuned(case, run)[0])
    assert same(models[0], state(models[1]))
