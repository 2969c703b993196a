"""`audit`: what it leaves alone, its words with and without a trigger, its checkpoints, and its errors."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from audit_cases import ATTACK, CLASSES, QUICK, figures, forgotten, same, stale, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bdfast
from bdfast.audits import (
    METHODS,
    Figures,
    PathAudit,
    RelearningAudit,
)


def test_every_audit_is_in_the_quick_ones():
    assert [type(audit) for audit in QUICK] == list(METHODS.values())


@pytest.mark.parametrize("triggered", [True, False])
def test_no_network_changes(planted, innocent, clean, shown, triggered):
    models = [copy.deepcopy(model) for model in (planted, forgotten(planted, clean), innocent)]
    models[0].train()
    models[1][0].weight.requires_grad_(False)
    models[2][4].weight.grad = torch.ones_like(models[2][4].weight)
    kept = [state(model) for model in models]
    modes = [[module.training for module in model.modules()] for model in models]
    with torch.inference_mode():
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        result = bdfast.audit(
            *models[:2],
            clean,
            shown if triggered else None,
            clean_model=models[2],
            methods=QUICK,
            target=None if triggered else 0,
            batch_size=16,
        )
        assert torch.equal(before, torch.random.get_rng_state())
    assert list(result.results) == list(METHODS)
    assert all(same(model, x) for model, x in zip(models, kept, strict=True))
    assert modes == [[module.training for module in model.modules()] for model in models]
    assert [x.requires_grad for x in models[1].parameters()] == [False] + 5 * [True]
    assert all(x.requires_grad for x in models[0].parameters())
    gradients = [x.grad for model in models for x in model.parameters() if x.grad is not None]
    assert len(gradients) == 1
    assert (gradients[0] == 1).all()


def test_same_seed_same_figures(planted, clean, shown):
    after = forgotten(planted, clean)
    runs = []
    for seed in (0, 0):
        torch.manual_seed(len(runs))
        runs.append(bdfast.audit(planted, after, clean, shown, methods=QUICK, batch_size=16, seed=seed))
    assert figures(runs[0]) == figures(runs[1])
    assert runs[0].options["seed"] == 0
    assert runs[0].options["retuning"]["lr"] == 0.02


def test_without_triggered_data_no_figure_is_called_asr(planted, clean):
    after = forgotten(planted, clean)
    result = bdfast.audit(planted, after, clean, methods=QUICK, target=ATTACK.target, batch_size=16)
    assert result.rate_name == "surrogate rate"
    assert result.trigger["kind"] == "surrogate"
    assert result.trigger["target"] == ATTACK.target
    assert result.o_asr is None
    assert result.p_asr == {}
    assert set(result.p_rates) == {"batch_statistics", "retuning", "reactivation"}
    assert result.before.rate > 0.5
    written = json.dumps(result.as_json()) + str(result) + " ".join(result.sentences())
    assert "asr" not in written.lower()
    assert written.count("surrogate rate") > 10
    assert "as far as a surrogate trigger tells" in result.verdict
    assert any("stands in for the trigger" in note for note in result.notes)
    assert any("clean_model tells" in note for note in result.notes)
    assert any("20 held-out images" in note for note in result.notes)


def test_a_surrogate_that_works_in_a_clean_network_says_nothing(planted, clean):
    result = bdfast.audit(
        planted, planted, clean, methods="batch_statistics", clean_model=planted, target=ATTACK.target, batch_size=16
    )
    assert result.o_rate > 0.5
    assert result.status == "no sign"
    assert replace(result, clean_model=None).status == "not removed"
    assert not any("clean_model tells" in note for note in result.notes)


def test_with_triggers_the_words_are_those_of_the_field(planted, clean, shown):
    result = bdfast.audit(planted, stale(planted), clean, shown, methods=QUICK[:2], batch_size=16)
    assert result.o_asr == bdfast.evaluate(stale(planted), shown.data, shown).asr
    assert set(result.p_asr) == {"batch_statistics", "retuning"}
    stored = result.as_json()
    assert stored["ASR before audits"] == result.o_asr
    assert stored["results"]["batch_statistics"]["after_recalibrated"]["ASR"] == 1
    assert "surrogate" not in json.dumps(stored)


def test_without_a_suspect_only_what_needs_no_trigger_runs(planted, clean, monkeypatch):
    nothing = SimpleNamespace(triggers=(), rates=lambda scene: [])
    monkeypatch.setattr("bdfast.audits.case.find_surrogates", lambda scene, draws, targets: nothing)
    result = bdfast.audit(planted, planted, clean, batch_size=16)
    assert list(result.results) == ["batch_statistics", "path"]
    assert result.status == "not measured"
    assert result.o_rate is None
    assert result.p_rates == {}
    assert all(figures.rate is None for _, figures in result.curves["path"])
    assert any("retuning was left out" in note for note in result.notes)
    with pytest.raises(ValueError, match="methods: expected a trigger to poison images with for retuning, got none"):
        bdfast.audit(planted, planted, clean, batch_size=16, methods=["path", "retuning"])


def test_a_network_at_chance_is_told(clean, shown):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.warns(UserWarning, match="better than chance"):
        result = bdfast.audit(model, model, clean, shown, methods="path")
    assert "better than chance" in result.warnings[0]


def test_what_brings_nothing_back_is_no_good_sign(planted, clean, shown):
    """Neither audit gives a rate that could come back, so that nothing green may be said."""
    after = forgotten(planted, clean)
    result = bdfast.audit(planted, after, clean, shown, methods=["path", RelearningAudit(updates=1)], batch_size=32)
    assert result.o_rate < 0.2
    assert result.status == "not attacked"
    assert result.verdict.startswith("not attacked: the ASR")
    assert result.as_json()["status"] == "not attacked"


def test_a_network_that_was_not_purified(planted, clean, shown):
    result = bdfast.audit(planted, planted, clean, shown, methods="batch_statistics")
    assert result.status == "not removed"
    assert str(result) == "not removed: the ASR of the purified network is 100.0 %"


def test_where_acc_is_measured(planted, clean, shown):
    test = clean.subset((clean.labels == 1).nonzero().squeeze(1))
    for images, expected in ((None, shown.data), (test, test)):
        result = bdfast.audit(planted, stale(planted), clean, shown, test=images, methods="batch_statistics")
        assert result.after.acc == bdfast.evaluate(stale(planted), expected).acc
        assert result.after.rate == bdfast.evaluate(stale(planted), expected, shown).asr


def test_a_loader_and_a_plain_trigger(planted, clean, shown):
    def trigger(images):
        return ATTACK(images)

    view = bdfast.Triggered(shown.data, trigger, target=0)
    images, labels = clean.batch(torch.arange(len(clean)))
    loader = DataLoader(TensorDataset(images, labels), batch_size=16)
    after = forgotten(planted, clean)
    given = bdfast.audit(planted, after, clean, shown, methods=QUICK, batch_size=16)
    same_by_loader = bdfast.audit(planted, after, loader, view, methods=QUICK)
    assert figures(same_by_loader)["results"] == figures(given)["results"]
    assert same_by_loader.trigger == {"kind": "attack", "name": "function", "target": 0}


def test_dict_batches_without_images(clean):
    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return {"x": torch.full((4,), float(index % 2)), "y": index % 2}

    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    result = bdfast.audit(model, model, Items(), forward=lambda model, batch: (model(batch["x"]), batch["y"]))
    assert list(result.results) == ["batch_statistics", "path"]
    assert any("no images" in note for note in result.notes)


def test_save(planted, clean, shown, tmp_path):
    result = bdfast.audit(planted, stale(planted), clean, shown, methods=QUICK, batch_size=16)
    result.save(tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "audit.json").read_text(encoding="utf-8"))
    assert stored["status"] == "superficial"
    assert stored["verdict"] == result.verdict
    assert [row[0] for row in stored["results"]["path"]["curve"]] == [0, 0.5, 1]
    assert set(result.curves) == {"retuning", "path", "relearning"}
    assert result.curves["path"][0] == (0, Figures(*stored["results"]["path"]["curve"][0][1].values()))


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("pathh", "methods: expected names among batch_statistics, .*, got 'pathh'; did you mean 'path'"),
        (["path", PathAudit()], "methods: expected each audit once, got path twice"),
        ([], "methods: expected at least one audit, got none"),
    ],
)
def test_wrong_methods(planted, clean, shown, methods, message):
    with pytest.raises(ValueError, match=message):
        bdfast.audit(planted, planted, clean, shown, methods=methods)


def test_wrong_data(planted, clean, shown):
    with pytest.raises(TypeError, match=r"triggered: expected a bdfast.Triggered, .*, got ImageTensors; make one"):
        bdfast.audit(planted, planted, clean, clean)
    only = clean.subset((clean.labels == ATTACK.target).nonzero().squeeze(1))
    with pytest.raises(ValueError, match="triggered: expected images of other classes than the target, got none"):
        bdfast.audit(planted, planted, clean, bdfast.Triggered(only, ATTACK))
    images, labels = clean.batch(torch.arange(len(clean)))
    wide = TensorDataset(2 * images - 1, labels)
    with pytest.raises(ValueError, match=r"clean: expected images \[C, H, W\] in \[0, 1\], .*, got values in \[-1, "):
        bdfast.audit(planted, planted, wide, shown)
    with pytest.raises(ValueError, match=r"target: expected a class in 0..3, got 4"):
        bdfast.audit(planted, planted, clean, target=4)
