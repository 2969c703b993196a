import subprocess
import sys
from dataclasses import replace

import matplotlib
import pytest
import torch
from report_samples import LANDSCAPE, Page, audited, make_examples, make_result, make_scores, write

import bdfast
from bdfast.report import page
from bdfast.training import Epoch, Probe


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "new" / "folder"
    return write(folder, examples=make_examples(), landscape=LANDSCAPE, audit=audited())


def test_page_tells_the_result_and_needs_nothing_else(whole):
    parsed = Page(whole.read_text(encoding="utf-8"))
    assert whole.name == "report.html"
    assert parsed.tags.count("svg") == parsed.tags.count("script") == parsed.tags.count("link") == 0
    assert parsed.links
    assert all(link.startswith("data:image/") for link in parsed.links)
    assert whole.stat().st_size < 1_000_000
    text = " ".join(parsed.text.replace("\u00a0", " ").split())
    assert (
        "The trigger worked on 99.8 % of images; after purification it works on 1.9 %. "
        "Clean accuracy went from 92.2 % to 91.4 %." in text
    )
    assert "Attack success (ASR) 99.8 % 1.9 % \u221297.9 pts" in text
    assert "Defense effectiveness (DER) \u2013 98.6 %" in text
    assert "Reinitialised 97 of 976 neurons (9.9 %)" in text
    assert (
        "lr = 0.01 0.52 91.0 % 89.0 % lr = 0.03 0.02 90.0 % 89.0 % taken lr = 0.1 \u2013 87.0 % 89.0 % too costly"
        in text
    )
    assert "max_accuracy_drop 0.02" in text


def test_figures_lie_beside_the_page(whole):
    assert {path.name for path in whole.parent.iterdir()} == {"report.html", *page.FIGURES}
    for name in page.FIGURES:
        assert (whole.parent / name).read_bytes().startswith(b"\x89PNG")


def test_same_data_gives_the_same_bytes_whatever_the_settings_of_the_caller(whole, tmp_path):
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "font.size": 40}):
        kept = dict(matplotlib.rcParams)
        again = write(tmp_path, examples=make_examples(), landscape=LANDSCAPE, audit=audited())
        assert dict(matplotlib.rcParams) == kept
    for name in ("report.html", *page.FIGURES):
        assert (again.parent / name).read_bytes() == (whole.parent / name).read_bytes()


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, None, "Whether a trigger still works was not measured."),
        (
            bdfast.Metrics(acc=0.9),
            bdfast.Metrics(acc=0.8, der=None),
            "Clean accuracy went from 90.0 % to 80.0 %. Whether a trigger still works was not measured.",
        ),
        (
            bdfast.Metrics(acc=0.9, asr=1.0),
            bdfast.Metrics(acc=0.9, asr=0.97),
            "The trigger worked on 100.0 % of images; after purification it still works on 97.0 %. "
            "Clean accuracy went from 90.0 % to 90.0 %.",
        ),
        (
            None,
            bdfast.Metrics(acc=float("nan"), asr=0.5),
            "After purification the trigger works on 50.0 % of images.",
        ),
    ],
)
def test_headline(before, after, expected):
    assert page.headline(before, after).replace("\u00a0", " ") == expected


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (12.6, "13 s"), (59.9, "1 min 0 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds, text):
    assert page.duration(seconds).replace("\u00a0", " ") == text


@pytest.mark.parametrize(
    "changes",
    [
        {"before": None, "after": None, "result": make_result(history=[], options={}), "facts": {}},
        {
            "before": bdfast.Metrics(acc=0.9),
            "after": bdfast.Metrics(acc=0.8),
            "result": make_result(
                scores=None,
                neurons=None,
                history=[Probe("n", 0.1, float("nan"), 0.5, False), Epoch("fine-tune", 1, 0.5, 1.0, 1.0, 12)],
            ),
        },
        {
            "after": bdfast.Metrics(acc=float("nan"), ra=0.5),
            "result": make_result(
                scores=replace(make_scores((4, 3)), values=torch.tensor([0, 0, 0, 0, 0, 0, float("nan")])),
                neurons=torch.ones(7, dtype=torch.bool),
                history=[Epoch("unlearn", 1, float("nan"), 1.0, 1.0, 12)],
            ),
        },
    ],
    ids=["nothing", "no trigger", "degenerate"],
)
def test_incomplete_data_gives_a_sensible_page(changes, tmp_path):
    text = Page(write(tmp_path, **changes).read_text()).text
    assert "nan" not in text.lower()
    assert "None" not in text.replace("n None", "")


def test_hostile_text_stays_text(tmp_path):
    evil = "<script>alert('$\\frac{')</script>\u732b\x07\ud800\"><img src=x onerror=alert(1)> {{ 7 * 7 }}"
    examples = make_examples(class_names=[evil, "$\\frac{$", evil, "\u732b"])
    result = make_result(scores=make_scores(name=evil), options={evil: evil}, method=evil)
    result = replace(result, neurons=torch.zeros(976, dtype=torch.bool))
    path = write(tmp_path, title=evil, facts={evil: evil}, result=result, examples=examples)
    parsed = Page(path.read_text())
    assert "script" not in parsed.tags
    assert all(link.startswith("data:image/") for link in parsed.links)
    assert parsed.text.count("{{ 7 * 7 }}") > 5


def test_import_is_light():
    code = (
        "import sys, bdfast; assert 'matplotlib' not in sys.modules\n"
        "import bdfast.report; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
