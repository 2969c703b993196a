"""Figures draw what they are given, and the page says what they show."""

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from report_samples import BEFORE, HISTORY, LANDSCAPE, Page, make_result, make_scores, write

import bdfast
from bdfast.defenses import Defense
from bdfast.report import figures, landscape_figures
from bdfast.training import Epoch, Probe


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def points(figure, colour):
    clouds = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    return np.concatenate([c.get_offsets() for c in clouds if to_hex(c.get_facecolor()[0]) == colour])


BY_DEFAULT = {"scored_by": Defense.scored_by, "neurons_are": Defense.neurons_are}


def test_a_method_says_what_its_scores_are(tmp_path):
    nothing = torch.zeros(len(make_scores()), dtype=torch.bool)
    for neurons, said in (
        (None, "Which neurons were reinitialised One point"),
        (nothing, "The scores of the neurons One point per neuron"),
    ):
        changes = {} if neurons is None else {"neurons": neurons}
        path = write(tmp_path, result=make_result(**changes))
        text = " ".join(Page(path.read_text(encoding="utf-8")).text.split())
        assert said in text
        assert "The further right, the more suspicious it is: weight change while unlearning (sum of |Δw|)." in text
        assert ("None was reinitialised." in text) == (neurons is not None)


WORDS = {"scored_by": "weight change", "done": "reinitialised"}


def test_the_strips_draw_every_neuron_and_count_the_marked_ones():
    result = make_result()
    result.scores.values[5] = 0
    figure = figures.neuron_scores(result.scores, result.neurons, **WORDS)
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
    assert not any(text.startswith("from") for text in texts(figures.neuron_scores(make_scores(), neurons, **WORDS)))


def test_weight_change_of_a_deep_model_keeps_the_layers_that_matter():
    scores = make_scores((4,) * 200)
    neurons = torch.zeros(800, dtype=torch.bool)
    neurons[600:] = True
    axes = figures.neuron_scores(scores, neurons, **WORDS).axes[0]
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
    path = write(tmp_path, result=make_result(method="pam", neurons=nothing, found={"target": 3}, **BY_DEFAULT))
    text = " ".join(Page(path.read_text(encoding="utf-8")).text.split())
    assert "Trigger leads to class 3" in text
    assert "How far the neurons moved" in text
    assert "reinitialised" not in text.replace("reinitialisation", "")
