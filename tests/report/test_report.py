import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from torch import nn

import bdfast
from bdfast import report
from bdfast.evaluation.landscape import Landscape
from bdfast.report import figures, landscape_figures, page
from bdfast.training import Epoch, Probe

VOID_TAGS = {"meta", "img", "source", "br", "link"}
WIDTHS = (16,) * 5 + (32,) * 4 + (64,) * 4 + (128,) * 4  # the neurons of PreAct-ResNet18 at width 16


def make_scores(widths=WIDTHS, name="layer"):
    generator = torch.Generator().manual_seed(0)
    values = [torch.exp(0.5 * torch.randn(w, generator=generator) + 0.1 * i) for i, w in enumerate(widths)]
    model = nn.ModuleDict({f"{name}{i}": nn.Conv2d(1, w, 1) for i, w in enumerate(widths)})
    return bdfast.NeuronScores(torch.cat(values), bdfast.NeuronIndex(model).layers)


HISTORY = [
    *(Epoch("unlearn", e, a, 1.0, 2.0, 12) for e, a in enumerate((0.9, 0.5, 0.1), 1)),
    Probe("lr", 0.01, 0.91, floor=0.89, chosen=False, residual=0.52),
    Probe("lr", 0.03, 0.9, floor=0.89, chosen=True, residual=0.02),
    Probe("lr", 0.1, 0.87, floor=0.89, chosen=False),
    *(Epoch("fine-tune", e, a, 1.0, 2.0, 12) for e, a in enumerate((0.8, 0.9), 1)),
]
BEFORE = bdfast.Metrics(acc=0.9218, asr=0.9981, ra=0.0017)
AFTER = bdfast.Metrics(acc=0.9142, asr=0.0192, ra=0.893).against(BEFORE)
PATH = [(0.0, BEFORE), (0.5, bdfast.Metrics(acc=0.9, asr=0.4)), (1.0, AFTER)]
LANDSCAPE = Landscape([0.0, 0.5, 1.0], ([0.1, 0.9, 2.5], [0.2, 0.3, 0.4]), PATH, "Measured on 3 images.")


def make_result(**changes):
    scores = make_scores()
    neurons = torch.zeros(len(scores), dtype=torch.bool)
    neurons[scores.values.topk(97).indices] = True
    options = {"n": None, "max_accuracy_drop": 0.02}
    return replace(
        bdfast.PurifyResult(nn.Identity(), "tsbd", scores, neurons, HISTORY, options, {}, 75.2, 48), **changes
    )


def make_examples(**changes):
    clean = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    triggered = clean.clone()
    triggered[..., -3:, -3:] = 1
    names = ["plane", "car", "bird", "cat"]
    values = report.Examples(clean, triggered, [1, 2, 3], [1, 2, 3], [1, 2, 3], [0] * 3, [1, 2, 2], names, [0] * 3)
    return replace(values, **changes)


def write(folder, **changes):
    values = {
        "title": "A demo",
        "before": BEFORE,
        "after": AFTER,
        "result": make_result(),
        "facts": {"Data": "digits"},
    }
    return report.write(folder, **(values | changes))


class Page(HTMLParser):
    """Reads a page as a browser would; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "srcset", "href", "action", "data")]
        assert not [k for k, _ in attributes if k.startswith("on")]
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        self.text += " " if tag in ("td", "th", "dt", "dd") else ""
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "new" / "folder"
    return write(folder, examples=make_examples(), landscape=LANDSCAPE)


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
        again = write(tmp_path, examples=make_examples(), landscape=LANDSCAPE)
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


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def points(figure, colour):
    clouds = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    return np.concatenate([c.get_offsets() for c in clouds if to_hex(c.get_facecolor()[0]) == colour])


def test_weight_change_draws_every_neuron_and_counts_the_reinitialised():
    result = make_result()
    result.scores.values[5] = 0
    figure = figures.weight_change(result.scores, result.neurons)
    marked, rest = points(figure, figures.BEFORE), points(figure, figures.AFTER)
    np.testing.assert_allclose(marked[:, 0], result.scores.values[result.neurons].double())
    assert len(rest) == 976 - 97 - 1
    rows = np.round(marked[:, 1]).astype(int)
    counts = [f"{(rows == i).sum()} / {len(layer)}" for i, layer in enumerate(result.scores.layers)]
    assert texts(figure)[:17] == counts
    assert texts(figure)[-1] == f"from {marked[:, 0].min():.3g}"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == ["layer0", "layer1"]


def test_weight_change_draws_no_cut_off_where_there_is_none():
    neurons = torch.zeros(976, dtype=torch.bool)
    neurons[[0, 975]] = True
    assert not any(text.startswith("from") for text in texts(figures.weight_change(make_scores(), neurons)))


def test_weight_change_of_a_deep_model_keeps_the_layers_that_matter():
    scores = make_scores((4,) * 200)
    neurons = torch.zeros(800, dtype=torch.bool)
    neurons[600:] = True
    axes = figures.weight_change(scores, neurons).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == figures.MAX_LAYERS
    assert labels[0] == "layer150"


def test_metrics_bars_are_as_long_as_the_numbers():
    figure = figures.metrics(BEFORE, bdfast.Metrics(acc=0.9142, asr=None))
    widths = [round(bar.get_width(), 2) for bar in figure.axes[0].patches]
    assert widths == [92.18, 91.42, 99.81, 0.17]


def test_accuracy_has_a_panel_for_each_stage_that_ran():
    titles = [axes.get_title(loc="left") for axes in figures.accuracy(HISTORY, width=figures.NARROW).axes]
    assert titles == ["Unlearning", "Fine-tuning"]
    (only,) = figures.accuracy(HISTORY[-2:]).axes
    np.testing.assert_allclose(only.lines[0].get_ydata(), [80, 90])


@pytest.mark.parametrize(("second", "shown"), [(True, "Fine-tuning ends at 80.0"), (False, "Fine-tuning ends at 90.0")])
def test_a_stage_that_was_undone_is_not_what_fine_tuning_ends_at(second, shown, tmp_path):
    epochs = [Epoch(f"fine-tune at {rate}", 1, acc, 1.0, 1.0, 12) for rate, acc in ((0.003, 0.9), (0.01, 0.8))]
    probes = [Probe("lr", rate, 0.9, 0.8, chosen=second == (rate == 0.01)) for rate in (0.003, 0.01)]
    path = write(tmp_path, result=make_result(method="uau", neurons=None, history=[*epochs, *probes]))
    text = " ".join(Page(path.read_text(encoding="utf-8")).text.split())
    assert shown in text
    assert ("What is grey was undone" in text) == (not second)


def test_landscape_ends_where_its_data_ends():
    figure = landscape_figures.path(LANDSCAPE)
    assert texts(figure) == ["ACC 91.4\u00a0%", "ASR 1.9\u00a0%"]
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), [99.81, 40, 1.92])
    assert texts(landscape_figures.sharpness(LANDSCAPE, width=figures.NARROW)) == ["before (2.5)", "after (0.4)"]


def test_a_method_that_resets_nothing_says_what_it_found(tmp_path):
    nothing = torch.zeros(len(make_scores()), dtype=torch.bool)
    path = write(tmp_path, result=make_result(method="pam", neurons=nothing, found={"target": 3}))
    text = " ".join(Page(path.read_text(encoding="utf-8")).text.split())
    assert "Trigger leads to class 3" in text
    assert "How far the neurons moved" in text
    assert "reinitialised" not in text.replace("reinitialisation", "")


def test_import_is_light():
    code = (
        "import sys, bdfast; assert 'matplotlib' not in sys.modules\n"
        "import bdfast.report; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
