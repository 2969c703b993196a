"""The audit on the page: its table, its figure, and its words."""

from dataclasses import replace

import pytest
from report_samples import Page, audited, write

from bdfast.audits import BatchStatisticsFinding, Figures
from bdfast.report import audit_figures


def test_the_table():
    rows = audit_figures.table(audited())
    assert [row["name"] for row in rows] == ["batch statistics", "retuning"]
    assert [row["before"] for row in rows] == ["2.0\u00a0%"] * 2
    assert [row["after"] for row in rows] == ["2.0\u00a0%", "97.0\u00a0%"]
    assert [row["control"] for row in rows] == ["\u2013", "11.0\u00a0%"]
    assert [row["tone"] for row in rows] == ["", "worse"]


@pytest.mark.parametrize("rate_name", ["ASR", "surrogate rate"])
def test_the_section(tmp_path, rate_name):
    page = Page(write(tmp_path, audit=audited(rate_name)).read_text(encoding="utf-8"))
    section = page.text.partition("Audit")[2].partition("About this run")[0]
    guessed = "" if rate_name == "ASR" else ", as far as a surrogate trigger tells"
    assert f"Superficial{guessed}: the {rate_name} of 2.0 % comes back: 97.0 % after retuning." in section
    assert ("A surrogate trigger stood in" in section) is (rate_name != "ASR")
    assert ("ASR" in section) is (rate_name == "ASR")
    assert "A note." in section
    assert (tmp_path / "audit.png").stat().st_size > 1000
    write(tmp_path)
    assert not (tmp_path / "audit.png").exists()


def test_the_figure():
    figure = audit_figures.courses(audited())
    assert len(figure.axes) == 2
    labels = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    assert labels[:2] == ["ACC (91.0\u00a0% at the end)", "ASR (2.0\u00a0% at the end)"]
    assert list(figure.axes[0].lines[1].get_ydata()) == [97, 2]


def test_an_audit_without_a_course_or_a_trigger(tmp_path):
    audit = audited(curves=False)
    write(tmp_path, audit=audit)
    assert not (tmp_path / "audit.png").exists()
    nothing = Figures(0.9)
    finding = BatchStatisticsFinding("ASR", 3, nothing, nothing, nothing, nothing)
    bare = replace(audit, before=nothing, after=nothing, results={"batch_statistics": finding})
    assert "Not measured: there is no trigger" in write(tmp_path, audit=bare).read_text(encoding="utf-8")
