"""Relearning: the count of updates, its budget, and what it is compared with."""

import pytest
from audit_cases import case_for, forgotten, same, state

import bdfast
from bdfast.audits import RelearningAudit


def test_the_first_update_at_which_it_works(planted, innocent, clean, shown):
    after = forgotten(planted, clean)
    kept = state(after)
    audit = RelearningAudit(every=2, updates=40, batch_size=32, lr=0.02)
    result = bdfast.audit(planted, after, clean, shown, clean_model=innocent, methods=audit)
    finding = result.results["relearning"]
    assert same(after, kept)
    assert finding.beside == "clean_model"
    for updates, curve in ((finding.updates, finding.curve), (finding.beside_updates, finding.beside_curve)):
        counts = [n for n, _ in curve]
        assert counts == list(range(0, counts[-1] + 1, 2))
        assert updates is not None
        assert 0 < updates <= 40
        assert all(figures.rate < 0.5 for n, figures in curve if n < updates)
        assert dict(curve)[updates].rate >= 0.5
        # It ends there, but for the two steps after which the loop first asks.
        assert counts[-1] <= max(updates, 4)
    assert f"after {finding.updates} updates" in " ".join(finding.sentences(result.after))
    assert result.p_rates == {}
    assert result.status == "not attacked"
    assert result.verdict.startswith("not attacked")


@pytest.mark.parametrize("most", [1, 2, 7])
def test_never_within_the_budget(planted, clean, shown, most):
    after = forgotten(planted, clean)
    audit = RelearningAudit(lr=1e-9, updates=most, every=3, batch_size=16)
    result = bdfast.audit(planted, after, clean, shown, methods=audit)
    finding = result.results["relearning"]
    assert finding.updates is None
    assert [n for n, _ in finding.curve] == [*range(0, most, 3), most]
    assert (finding.beside, finding.beside_updates) == ("before", 0)
    said = " ".join(finding.sentences(result.after))
    assert f"never within {most} updates" in said
    assert "after 0 updates" in said


def test_how_many_are_poisoned(planted, clean, shown, monkeypatch):
    counts = []

    def spy(network, data, *args, **kwargs):
        counts.append((len(data), len(data.chosen)))
        return network, ((0, args[0].figures(network)),)

    monkeypatch.setattr("bdfast.audits.relearning.trained_copy", spy)
    with case_for(planted, planted, clean, shown) as (case, run):
        RelearningAudit(poison_rate=0.25, images=40).run(case, run)
        RelearningAudit(poison_rate=0.001).run(case, run)
    assert counts == [(40, 10), (40, 10), (80, 1), (80, 1)]


def test_same_seed_same_curve(planted, clean, shown):
    after = forgotten(planted, clean)
    audit = RelearningAudit(every=1, updates=6, batch_size=16)
    runs = [bdfast.audit(planted, after, clean, shown, methods=audit, seed=seed) for seed in (0, 0, 1)]
    curves = [run.results["relearning"].curve for run in runs]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("options", [{"poison_rate": 0.0}, {"until": 1.5}, {"every": 0}, {"updates": 0}])
def test_wrong_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected .*, got .*; see its default"):
        RelearningAudit(**options)
