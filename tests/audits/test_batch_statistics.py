"""Batch statistics: a backdoor that stale statistics hide is caught, and nothing else."""

import pytest
from audit_cases import stale
from torch import nn

import bdfast
from bdfast.audits import BatchStatisticsFinding
from bdfast.audits.rates import Figures


def test_a_network_that_was_never_purified_is_caught(planted, clean, shown):
    hidden = stale(planted)
    result = bdfast.audit(planted, hidden, clean, shown, methods="batch_statistics")
    assert result.o_asr < 0.1
    assert result.p_asr["batch_statistics"] > 0.95
    finding = result.results["batch_statistics"]
    assert finding.hidden
    assert finding.layers == 1
    assert result.status == "superficial"
    assert result.verdict.startswith("superficial: the ASR of")
    assert "batch_statistics" in result.verdict
    assert any("stale statistics hid a backdoor" in sentence for sentence in result.sentences())


def test_the_figures_are_those_of_evaluate(planted, clean, shown):
    hidden = stale(planted)
    finding = bdfast.audit(planted, hidden, clean, shown, methods="batch_statistics").results["batch_statistics"]
    for model, plain, again in (
        (planted, finding.before, finding.before_recalibrated),
        (hidden, finding.after, finding.after_recalibrated),
    ):
        for figures, recalibrate_on in ((plain, None), (again, clean)):
            expected = bdfast.evaluate(model, shown.data, shown, recalibrate_on=recalibrate_on)
            assert (figures.acc, figures.rate) == (expected.acc, expected.asr)


def test_the_clean_network_is_measured_with_new_statistics_too(planted, innocent, clean, shown):
    hidden = stale(planted)
    result = bdfast.audit(planted, hidden, clean, shown, clean_model=stale(innocent), methods="batch_statistics")
    finding = result.results["batch_statistics"]
    expected = bdfast.evaluate(stale(innocent), shown.data, shown, recalibrate_on=clean)
    control = finding.clean_model_recalibrated
    assert (control.acc, control.rate) == (expected.acc, expected.asr)
    assert finding.by_itself == expected.asr
    assert "A clean network has" in " ".join(finding.sentences(finding.after))
    assert result.status == "superficial"


def test_what_a_clean_network_shows_as_well_is_no_sign(planted, clean, shown):
    """Here the control reaches as much."""
    hidden = stale(planted)
    result = bdfast.audit(planted, hidden, clean, shown, clean_model=hidden, methods="batch_statistics")
    finding = result.results["batch_statistics"]
    assert finding.by_itself == finding.p_rate > 0.95
    assert not finding.hidden
    assert result.back == []
    assert result.status == "no sign"


@pytest.mark.parametrize(("rate", "hidden"), [(0.25, True), (0.15, False), (None, False)])
def test_what_counts_as_hidden(rate, hidden):
    start = None if rate is None else 0.0
    finding = BatchStatisticsFinding(
        "ASR", 1, Figures(1.0, 1.0), Figures(1.0, 1.0), Figures(1.0, start), Figures(1.0, rate)
    )
    assert finding.hidden is hidden
    assert any("comes back" in sentence for sentence in finding.sentences(finding.after)) is hidden


def test_a_network_without_statistics(clean, shown):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    result = bdfast.audit(model, model, clean, shown, methods="batch_statistics")
    finding = result.results["batch_statistics"]
    assert finding.after == finding.after_recalibrated
    assert finding.sentences(finding.after) == [
        "The purified network keeps no running statistics: there is nothing to estimate anew."
    ]
