"""What triggers lead to: the labels that are measured, whatever form the labels of the data have."""

import pytest
import torch
from audit_cases import ATTACK, CLASSES, figures, forgotten, pictures
from torch.utils.data import TensorDataset

import bdfast
from bdfast.attacks import all_to_all
from bdfast.audits import ReactivationAudit, RelearningAudit, RetuningAudit
from bdfast.audits.triggers import AttackTrigger, Poisoned, Shown
from bdfast.data.batches import Batches

FORMS = {
    "uint8": lambda labels: labels.to(torch.uint8),
    "float": lambda labels: labels.float(),
    "column": lambda labels: labels[:, None],
    "float column": lambda labels: labels[:, None].double(),
}


@pytest.mark.parametrize(
    "attack",
    [
        bdfast.BadNets(size=2),
        bdfast.BadNets(size=2, clean_label=True),
        bdfast.BadNets(size=2, targets=all_to_all(CLASSES)),
        bdfast.BadNets(size=2, targets=(1, 0)),  # has no label for the other classes
    ],
)
def test_a_target_of_the_view_comes_first(clean, attack):
    view = bdfast.Triggered(pictures(60, seed=2), attack, target=3)
    trigger = AttackTrigger(view)
    images, labels = clean.batch(torch.arange(len(clean)))
    assert (trigger.shown(images, labels)[1] == 3).all()
    assert (trigger.planted(images, labels)[1] == 3).all()
    assert torch.equal(trigger.victims(images, labels), labels != 3)
    assert trigger.as_json() == {"kind": "attack", "name": "BadNets", "target": 3}


@pytest.mark.parametrize("target", [None, 1])
def test_the_labels_of_the_attack_are_kept_where_the_view_has_them(clean, target):
    attack = bdfast.BadNets(size=2, target=1, clean_label=True)
    images, labels = clean.batch(torch.arange(len(clean)))
    trigger = AttackTrigger(bdfast.Triggered(pictures(60, seed=2), attack, target=target))
    assert torch.equal(trigger.victims(images, labels), labels == 1)
    targets = all_to_all(CLASSES)
    trigger = AttackTrigger(bdfast.Triggered(pictures(60, seed=2), bdfast.BadNets(targets=targets)))
    assert torch.equal(trigger.shown(images, labels)[1], (labels + 1) % CLASSES)
    assert trigger.as_json()["target"] == list(targets)


def test_what_is_poisoned_is_what_is_measured(planted, clean):
    """Retuning towards the label of the view brings the ASR for that label up."""
    view = bdfast.Triggered(pictures(60, seed=2), ATTACK, target=3)
    method = RetuningAudit(poisons=20, epochs=5, batch_size=16, lr=0.02)
    result = bdfast.audit(planted, forgotten(planted, clean), clean, view, methods=method, amp=False)
    assert result.o_asr < 0.1
    assert result.p_asr["retuning"] > 0.8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("targets", [(), all_to_all(CLASSES)])
def test_labels_of_any_form(clean, form, targets):
    images, labels = clean.batch(torch.arange(len(clean)))
    data = Batches(TensorDataset(images, FORMS[form](labels)), device="cpu", batch_size=16)
    plain = Batches(TensorDataset(images, labels), device="cpu", batch_size=16)
    trigger = AttackTrigger(bdfast.Triggered(pictures(60, seed=2), bdfast.BadNets(size=2, targets=targets)))
    found, expected = (list(Shown(batches, trigger.shown).ordered()) for batches in (data, plain))
    for one, other in zip(found, expected, strict=True):
        for x, y in zip(one, other, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
    poisoned, others = (Poisoned(batches, trigger, 30, seed=0) for batches in (data, plain))
    assert torch.equal(poisoned.chosen, others.chosen)
    for (_, (x, y)), (_, (like_x, like_y)) in zip(poisoned.numbered(), others.numbered(), strict=True):
        assert torch.equal(x, like_x)
        assert y.dtype == FORMS[form](like_y).dtype
        assert torch.equal(y, FORMS[form](like_y))


@pytest.mark.parametrize("form", ["uint8", "float", "column"])
def test_an_audit_with_labels_of_another_form(planted, clean, form):
    images, labels = clean.batch(torch.arange(len(clean)))
    after = forgotten(planted, clean)
    view = bdfast.Triggered(pictures(60, seed=2), bdfast.BadNets(size=2, targets=all_to_all(CLASSES)))
    methods = (
        RetuningAudit(epochs=1, batch_size=32),
        ReactivationAudit(epochs=1, batch_size=32, images=32, retuning=RetuningAudit(epochs=1)),
        RelearningAudit(updates=2, every=2, batch_size=32),
    )
    runs = [
        bdfast.audit(planted, after, TensorDataset(images, y), view, methods=methods, batch_size=16)
        for y in (labels, FORMS[form](labels))
    ]
    assert figures(runs[0]) == figures(runs[1])


def test_labels_that_are_no_whole_numbers(clean, shown):
    images, labels = clean.batch(torch.arange(len(clean)))
    data = Batches(TensorDataset(images, labels + 0.5), device="cpu", batch_size=16)
    with pytest.raises(ValueError, match="labels: expected whole numbers"):
        Poisoned(data, AttackTrigger(shown), 5, seed=0)
