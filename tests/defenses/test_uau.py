"""UAU removes a backdoor, says so, and leaves a network alone that it cannot improve."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

import bdfast
from bdfast import selection
from bdfast.defenses import UAUDefense, uau
from bdfast.defenses.verdict import Verdict
from bdfast.inversion import surrogates
from bdfast.inversion.least_length import LeastLengths
from bdfast.inversion.scene import ALL_TO_ALL
from bdfast.training import Epoch, Probe


@pytest.mark.slow
def test_a_backdoor_is_removed_and_the_verdict_is_right(backdoored, digits, tmp_path):
    model, judge, before = backdoored
    # On images of 8 x 8 pixels no class stands out: a patch of 2 x 2 is as long a change as any.
    result = bdfast.purify(model, digits[1], method="uau", target=0, amp=False, augment=None)
    after = judge(result.model)
    assert result.verdict.targets == (0,)
    assert result.verdict.residual_before > 0.9
    assert result.verdict.residual_after < 0.5
    assert after.asr < 0.1
    assert after.acc > before.acc - 0.1
    assert result.found["targets"] == [0]
    assert "target label 0, residual 1.00 -> 0." in str(result.verdict)
    result.save(tmp_path)
    saved = json.loads((tmp_path / "result.json").read_text())["verdict"]
    assert saved["status"] == result.verdict.status
    assert saved["residual_after"] == result.verdict.residual_after


QUICK = {"amp": False, "augment": None, "updates": 4, "rounds": 2}


def test_the_same_arguments_give_the_same_bits(trained, clean):
    first, second = (bdfast.purify(trained, clean, method="uau", **QUICK) for _ in range(2))
    assert all(map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values()))
    assert first.verdict == second.verdict


def test_a_stage_that_costs_too_much_is_undone(trained, clean, monkeypatch):
    options = {**QUICK, "target": 1}
    monkeypatch.setattr(selection, "ENOUGH", -1.0)  # no stage is enough
    monkeypatch.setattr(selection, "WORTH", -1.0)  # and the first is worth it
    monkeypatch.setattr(UAUDefense, "rates", (0.003,))
    one = bdfast.purify(trained, clean, method="uau", **options)
    monkeypatch.setattr(UAUDefense, "rates", (0.003, 30.0))  # the second ruins the network
    undone = bdfast.purify(trained, clean, method="uau", **options)
    first, second = (row for row in undone.history if isinstance(row, Probe))
    assert (first.chosen, second.chosen) == (True, False)
    assert second.accuracy < second.floor
    assert first.residual == undone.verdict.residual_after
    assert undone.verdict == one.verdict
    assert all(map(torch.equal, undone.model.state_dict().values(), one.model.state_dict().values()))


def test_what_costs_more_than_the_budget_is_said(trained, clean, monkeypatch):
    """The first stage is taken where a class is clearly suspected, whatever it costs."""
    for rate, costly in ((1e-6, False), (3.0, True)):
        monkeypatch.setattr(UAUDefense, "rates", (rate,))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = bdfast.purify(trained, clean, method="uau", target=1, **QUICK)
        message = "max_accuracy_drop: expected a held-out accuracy of "
        assert any(text.startswith(message) for text in result.warnings) == costly
        assert any(str(warning.message).startswith(message) for warning in caught) == costly


def test_with_a_rate_there_is_one_stage_on_all_images_and_no_verdict(trained, clean):
    result = bdfast.purify(trained, clean, method="uau", lr=0.003, **QUICK)
    assert result.verdict is None
    assert {row.stage for row in result.history if isinstance(row, Epoch)} == {
        "fine-tune, round 1",
        "fine-tune, round 2",
    }


def test_a_target_that_is_known_is_taken(trained, clean):
    result = bdfast.purify(trained, clean, method="uau", target=7, **QUICK)
    assert result.verdict.targets == (7,)


def test_against_a_target_for_each_label_it_trains_on_changes_that_lead_away(trained, clean, monkeypatch):
    found, least = [], uau.least_lengths
    monkeypatch.setattr(surrogates, "least_lengths", lambda *a, **k: replace(least(*a, **k), away=0.05))
    lead = uau.lead
    monkeypatch.setattr(
        uau, "lead", lambda scene, targets, *a, **k: found.append(targets) or lead(scene, targets, *a, **k)
    )
    result = bdfast.purify(trained, clean, method="uau", **QUICK)
    assert result.verdict.targets == (ALL_TO_ALL,)
    assert "all-to-all, residual" in str(result.verdict)
    assert result.found["all_to_all_length"] == pytest.approx(0.05)
    assert all((targets == ALL_TO_ALL).all() for targets in found)
    assert len(found) > 0


def test_without_a_suspect_one_stage_against_all_classes_is_all(trained, clean, monkeypatch):
    monkeypatch.setattr(LeastLengths, "suspects", property(lambda self: []))
    result = bdfast.purify(trained, clean, method="uau", **QUICK)
    assert result.verdict.status == "nothing found"
    assert str(result.verdict).startswith("nothing found: ")
    stages = {row.stage for row in result.history if isinstance(row, Epoch)}
    assert stages == {"fine-tune at 0.003, round 1", "fine-tune at 0.003, round 2"}


@pytest.mark.parametrize(("clear", "stages"), [(True, 2), (False, 1)])
def test_where_no_class_is_clearly_easier_one_stage_is_all(trained, clean, monkeypatch, clear, stages):
    monkeypatch.setattr(LeastLengths, "suspects", property(lambda self: [1, 2]))
    monkeypatch.setattr(LeastLengths, "gap", property(lambda self: 2.0 if clear else 1.1))
    monkeypatch.setattr(surrogates, "PATCHED", 2.0)  # patches tell nothing
    monkeypatch.setattr(selection, "ENOUGH", -1.0)  # nor is any stage enough
    result = bdfast.purify(trained, clean, method="uau", max_accuracy_drop=1.0, **QUICK)
    assert result.verdict.clear == clear
    assert len([row for row in result.history if isinstance(row, Probe)]) == stages


def test_a_rate_that_comes_twice_has_a_name_of_its_own(trained, clean, monkeypatch, tmp_path):
    """Else its checkpoint would be that of the first time."""
    monkeypatch.setattr(UAUDefense, "rates", (3.0, 12.0))
    result = bdfast.purify(trained, clean, method="uau", target=1, workdir=tmp_path, **QUICK)
    stages = [row.stage for row in result.history if isinstance(row, Epoch)]
    assert "fine-tune at 3, round 1" in stages
    assert "fine-tune at 3, again, round 1" in stages


def test_without_a_suspect_a_network_is_not_ruined(trained, clean, monkeypatch):
    monkeypatch.setattr(LeastLengths, "suspects", property(lambda self: []))
    monkeypatch.setattr(UAUDefense, "rates", (3.0,))
    lowered = bdfast.purify(trained, clean, method="uau", **QUICK)
    assert lowered.options["lr"] < 3.0
    assert lowered.verdict.accuracy_after >= lowered.verdict.accuracy_before - 0.1
    monkeypatch.setattr(selection, "RETRIES", 0)
    result = bdfast.purify(trained, clean, method="uau", **QUICK)
    assert result.verdict.accuracy_after == result.verdict.accuracy_before
    assert all(map(torch.equal, result.model.state_dict().values(), trained.state_dict().values()))
    assert not any(row.chosen for row in result.history if isinstance(row, Probe))


@pytest.mark.parametrize(
    ("targets", "after", "status"),
    [
        ((), 0.0, "nothing found"),
        ((1,), 0.0, "removed"),
        ((1,), 0.05, "removed"),
        ((1,), 0.06, "reduced"),
        ((1,), 0.14, "reduced"),
        ((1,), 0.15, "not removed"),
        ((1, 2), 1.0, "not removed"),
        ((ALL_TO_ALL,), 0.01, "removed"),
    ],
)
def test_verdicts(targets, after, status):
    verdict = Verdict(targets, 1.0, after, 0.9, 0.88, 100)
    assert verdict.status == status
    assert str(verdict).startswith(status)
    assert verdict.as_json()["status"] == status


def test_where_no_class_is_clearly_easier_nothing_is_found():
    verdict = Verdict((1, 2), 0.9, 0.01, 0.9, 0.88, 100, clear=False)
    assert verdict.status == "nothing found"
    assert str(verdict).startswith("nothing found: no class stands out clearly; of the easiest, 1, 2: residual 0.9")


@pytest.mark.parametrize("option", ["rounds", "updates"])
def test_options_that_are_too_small(option):
    with pytest.raises(ValueError, match=f"{option}: expected at least 1, got 0"):
        UAUDefense(**{option: 0})


def test_strict_raises_with_the_result(trained, clean):
    with pytest.raises(bdfast.PurificationError, match=r"strict: expected .*, got no verdict; leave lr out") as caught:
        bdfast.purify(trained, clean, method="uau", lr=0.003, strict=True, **QUICK)
    assert caught.value.result.verdict is None
    kept = bdfast.purify(trained, clean, method="uau", lr=0.003, **QUICK)
    states = (kept.model.state_dict().values(), caught.value.result.model.state_dict().values())
    assert all(map(torch.equal, *states))


@pytest.mark.parametrize(
    ("targets", "after", "damaged", "successful"),
    [((), 0.0, False, True), ((1,), 0.01, False, True), ((1,), 0.1, False, False), ((1,), 0.01, True, False)],
)
def test_what_counts_as_a_success(trained, clean, targets, after, damaged, successful):
    result = bdfast.purify(trained, clean, method="uau", lr=0.003, **QUICK)
    verdict = Verdict(targets, 1.0, after, 0.9, 0.88, 100)
    assert replace(result, verdict=verdict, damaged=damaged).successful == successful
