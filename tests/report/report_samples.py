"""What the tests of the report write: a result, its pictures, and a reader of the page."""

from dataclasses import replace
from html.parser import HTMLParser

import torch
from torch import nn

import bdfast
from bdfast import report
from bdfast.audits import Audit, BatchStatisticsFinding, Figures, PathFinding, RetuningFinding
from bdfast.audits.landscape import Landscape
from bdfast.defenses import TSBDDefense
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

LOW, HIGH = Figures(0.91, 0.02), Figures(0.9, 0.97)


def make_result(**changes):
    scores = make_scores()
    neurons = torch.zeros(len(scores), dtype=torch.bool)
    neurons[scores.values.topk(97).indices] = True
    options = {"n": None, "max_accuracy_drop": 0.02}
    words = {"scored_by": TSBDDefense.scored_by, "neurons_are": TSBDDefense.neurons_are}
    result = bdfast.PurifyResult(nn.Identity(), "tsbd", scores, neurons, HISTORY, options, {}, 75.2, 48, **words)
    return replace(result, **changes)


def audited(rate_name="ASR", curves=True):
    results = {"batch_statistics": BatchStatisticsFinding(rate_name, 3, HIGH, HIGH, LOW, LOW)}
    if curves:
        control = ((0, LOW), (5, Figures(0.9, 0.11)))
        results["retuning"] = RetuningFinding(rate_name, 100, 5, 5, ((0, LOW), (5, HIGH)), control)
        results["path"] = PathFinding(rate_name, "recalibrate", ((0.0, HIGH), (1.0, LOW)), 0.0, 1.0)
    return Audit(HIGH, LOW, LOW, results, rate_name, {}, ["A note."], {}, 3.0)


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
