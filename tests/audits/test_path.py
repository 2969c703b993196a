"""Path: its ends are the two networks, and the error barrier by hand."""

import pytest
import torch
from audit_cases import case_for, forgotten, stale
from torch import nn

import bdfast
from bdfast.audits import PathAudit
from bdfast.audits.path import CONVENTION, barrier, nearest
from bdfast.audits.rates import Figures


@pytest.mark.parametrize("bn", ["recalibrate", "interpolate"])
def test_the_ends_are_the_networks(planted, clean, shown, bn):
    before, after = stale(planted), forgotten(planted, clean)
    finding = bdfast.audit(before, after, clean, shown, methods=PathAudit(points=4, bn=bn)).results["path"]
    assert [t for t, _ in finding.curve] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    for (_, figures), model in zip((finding.curve[0], finding.curve[-1]), (before, after), strict=True):
        own = bdfast.evaluate(model, shown.data, shown, recalibrate_on=clean if bn == "recalibrate" else None)
        assert (figures.acc, figures.rate) == (own.acc, own.asr)
    # The statistics of `before` are stale, which only "interpolate" shows.
    assert (finding.curve[0][1].rate > 0.9) is (bn == "recalibrate")
    assert finding.convention == CONVENTION
    assert finding.as_json()["bn"] == bn
    assert finding.p_rate is None


@pytest.mark.parametrize("bn", ["recalibrate", "interpolate"])
def test_in_between(planted, clean, shown, bn):
    after = forgotten(planted, clean)
    finding = bdfast.audit(planted, after, clean, shown, methods=PathAudit(points=3, bn=bn)).results["path"]
    middle = forgotten(planted, clean)
    with torch.no_grad():
        for x, y in zip(middle.parameters(), planted.parameters(), strict=True):
            x.copy_((x + y) / 2)
        for name in ("running_mean", "running_var"):
            getattr(middle[1], name).copy_((getattr(planted[1], name) + getattr(after[1], name)) / 2)
    own = bdfast.evaluate(middle, shown.data, shown, recalibrate_on=clean if bn == "recalibrate" else None)
    assert (finding.curve[1][1].acc, finding.curve[1][1].rate) == (own.acc, own.asr)


def curve(*rows):
    return tuple((t, Figures(acc, rate)) for t, acc, rate in rows)


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [((0.9, 0.5, 0.7), 0.3), ((0.9, 0.8, 0.7), 0.0), ((0.5, 0.9, 0.5), 0.0), ((0.8, 0.8), 0.0)],
)
def test_the_error_barrier(accuracies, expected):
    last = len(accuracies) - 1
    rows = [(i / last, accuracy, None) for i, accuracy in enumerate(accuracies)]
    assert barrier(curve(*rows)) == pytest.approx(expected)


def test_how_near_the_backdoor_is():
    assert nearest(curve((0, 1, 1.0), (0.5, 1, 0.5), (0.75, 1, 0.4), (1, 1, 0.0))) == 0.5
    assert nearest(curve((0, 1, 1.0), (0.5, 1, 0.1), (1, 1, 0.7))) == 0
    assert nearest(curve((0, 1, 0.4), (1, 1, 0.0))) is None
    assert nearest(curve((0, 1, None), (1, 1, None))) is None


def test_buffers_that_are_infinite(planted, clean, shown):
    class Masked(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network
            self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -torch.inf]))

        def forward(self, x):
            return self.network(x) + self.mask

    with case_for(Masked(planted), Masked(planted), clean, shown) as (case, run):
        finding = PathAudit(points=3, bn="interpolate").run(case, run)
    assert finding.curve[1][1] == finding.curve[0][1]


def test_networks_of_other_shapes(planted, clean, shown):
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()
    message = "methods: expected two networks of the same architecture for path, got none; "
    with pytest.raises(ValueError, match=message):
        bdfast.audit(planted, other, clean, shown, methods=["batch_statistics", "path"])


@pytest.mark.parametrize(("options", "message"), [({"points": 1}, "points: .* 2, got 1"), ({"bn": "at"}, "bn: .*'at'")])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        PathAudit(**options)
