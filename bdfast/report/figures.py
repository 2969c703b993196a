"""The figures of the report, each a function that returns a `matplotlib.figure.Figure`.

Nothing here touches pyplot, so no window, backend or figure list of the caller is involved. Colours are from
Okabe and Ito's palette, told apart under every common colour blindness: vermilion stands for the backdoored
model and what was taken out of it, blue for the purified model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import font_manager, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bdfast.report.curves import Part, curve, known
from bdfast.report.examples import MAX_SHOWN, Examples
from bdfast.training import History

if TYPE_CHECKING:
    from bdfast.evaluation import Metrics
    from bdfast.neurons import NeuronLayer, NeuronScores

WIDE, NARROW = 7.6, 3.7  # inches: a desktop column and a phone
BEFORE, AFTER = "#d55e00", "#0072b2"
INK, MUTED, HAIRLINE, BAND = "#1f2933", "#667079", "#e3e6e8", "#f6f7f8"
METRICS = {"acc": "Clean accuracy (ACC)", "asr": "Attack success (ASR)", "ra": "Robust accuracy (RA)"}
MAX_LAYERS = 48
_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same figure on every machine
    "font.size": 8.5,
    "text.parse_math": False,  # class and layer names may hold a dollar sign
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "xtick.minor.size": 0,
    "figure.constrained_layout.w_pad": 0,  # flush with the text around the figure
    "ytick.major.size": 0,
}
# "default" first: neither a style of the caller nor TeX reaches a figure. Settings are restored after each.
styled = style.context(["default", _STYLE])


def percent(value: float, *, digits: int = 1) -> str:
    """0.9218 as '92.2 %', with a space that does not break."""
    return f"{100 * value:.{digits}f}\u00a0%"


@styled
def metrics(before: Metrics | None, after: Metrics | None, *, width: float = WIDE) -> Figure:
    """ACC, ASR and RA of the original model and of the purified one, as pairs of bars; one is known at least.

    Args:
        before: Measured on the original model, or None.
        after: Measured on the purified model, or None.
        width: Inches.
    """
    rows: list[tuple[str, list[tuple[str, str, float]]]] = []
    for key, label in METRICS.items():
        sides = (("before", BEFORE, before), ("after", AFTER, after))
        measured = [(side, colour, known(getattr(m, key, None))) for side, colour, m in sides]
        if bars := [(side, colour, value) for side, colour, value in measured if value is not None]:
            rows.append((label, bars))
    figure = Figure(figsize=(width, 0.55 + 0.78 * len(rows)), layout="constrained")
    axes = figure.subplots()
    y = 0.0
    for label, bars in rows:
        axes.text(0, y, label, weight="bold", va="center")
        for side, colour, value in bars:
            y += 1
            axes.barh(y, 100 * value, height=0.78, color=colour)
            axes.text(100 * value + 1.5, y, f"{percent(value)} {side}", va="center")
        y += 1.5
    # The room right of 100 is for the labels of full bars.
    axes.set(xlim=(0, 150 if width < 5 else 128), xticks=range(0, 101, 25))
    axes.set(ylim=(y - 0.8, -0.6), yticks=[])
    axes.set_xlabel("share of test images (%)", loc="left")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x")
    return figure


@styled
def neuron_scores(
    scores: NeuronScores, neurons: torch.Tensor, *, scored_by: str, done: str, width: float = WIDE
) -> Figure:
    """One strip per layer, one point per neuron, those of `neurons` in vermilion and counted.

    Args:
        scores: Of every neuron, [R], and the layers they belong to.
        neurons: [R] bool.
        scored_by: What the scores are.
        done: What happened to `neurons`, in one word.
        width: Inches.

    Notes:
        Neurons without a positive, finite score have no place on a log axis and are left out.
        Of more than 48 layers, those with the most of `neurons` are drawn.
    """
    values = scores.values.detach().double().cpu().numpy()
    marked = neurons.cpu().numpy()
    layers = _shown_layers(scores.layers, marked)
    pitch = 0.25 if len(layers) <= 24 else 0.18
    figure = Figure(figsize=(width, 0.8 + pitch * len(layers)), layout="constrained")
    axes = figure.subplots()
    rows = np.concatenate([np.arange(layer.start, layer.stop) for layer in layers])
    at = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
    drawn = np.isfinite(values[rows]) & (values[rows] > 0)
    x, at, orange = values[rows][drawn], at[drawn], marked[rows][drawn]
    y = at + np.random.default_rng(0).uniform(-0.3, 0.3, len(at))
    for i in range(0, len(layers), 2):
        axes.axhspan(i - 0.5, i + 0.5, color=BAND, linewidth=0)
    # Thousands of points: as pixels inside the SVG they cost a tenth of what they would as shapes.
    points: dict[str, Any] = {"linewidths": 0, "rasterized": True}
    size = 5 / max(1, len(x) / 5000) ** 0.5
    axes.scatter(x[~orange], y[~orange], s=size, color=AFTER, alpha=0.4, **points)
    axes.scatter(x[orange], y[orange], s=max(1.6 * size, 3), color=BEFORE, alpha=0.75, **points)
    _log_axis(axes, x)
    axes.set_xlabel(f"{scored_by}, log scale", loc="left")
    axes.set_ylim(len(layers) - 0.5, -0.5)
    limit = 18 if width < 5 else 30
    # The end of a long name tells layers apart.
    names = [printable(layer.parameter.removesuffix(".weight"), limit, end=True) for layer in layers]
    axes.set_yticks(range(len(layers)), names, color=INK, size=8 if pitch > 0.2 else 7)
    axes.spines["left"].set_visible(False)
    _count_column(axes, layers, marked, done)
    if orange.any() and (~orange).any() and x[orange].min() >= x[~orange].max():
        _cut_off(axes, x[orange].min())
    return figure


@styled
def accuracy(history: History, *, width: float = WIDE) -> Figure:
    """Clean accuracy by epoch, a panel for unlearning and one for fine-tuning, as far as there are rows.

    Args:
        history: An `Epoch` of stage "unlearn" or "fine-tune" at least. Learning rates that follow each other are told
            apart; one that was undone is grey.
        width: Inches.
    """
    panels = [
        (title, colour, parts)
        for name, title, colour in (("unlearn", "Unlearning", BEFORE), ("fine-tune", "Fine-tuning", AFTER))
        if (parts := curve(history, name))
    ]
    shape = (len(panels), 1) if width < 5 else (1, len(panels))
    figure = Figure(figsize=(width, 2.3 * shape[0] + 0.1), layout="constrained")
    grid = figure.subplots(*shape, sharey=True, squeeze=False).ravel()
    for axes, (title, colour, parts) in zip(grid, panels, strict=True):
        first, last = parts[0].points[0][0], parts[-1].points[-1][0]
        for part in parts:
            _part(axes, part, colour if part.kept else MUTED, several=len(parts) > 1)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        span = max(last - first, 1)
        axes.set_xlim(first - 0.02 * span, last + 0.17 * span)
        ticks = MaxNLocator(6, integer=True).tick_values(first, last)
        axes.set_xticks([tick for tick in ticks if first <= tick <= last])
        axes.set(ylim=(0, 100), yticks=range(0, 101, 25))
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("clean accuracy (%)")
    return figure


def _part(axes: Axes, part: Part, colour: str, *, several: bool) -> None:
    """The line of a learning rate, what it ends at, and, beside others, which one it is."""
    epochs, values = zip(*((x, 100 * y) for x, y in part.points), strict=True)
    axes.plot(epochs, values, color=colour, linewidth=1.8, marker="o", markersize=3.5, clip_on=False)
    text: dict[str, Any] = {"textcoords": "offset points", "weight": "bold", "color": colour}
    end = percent(part.points[-1][1])
    if several:
        axes.annotate(end, (epochs[-1], values[-1]), (0, -13), ha="center", **text)
        axes.annotate(f"lr {part.rate}", (epochs[0], 0), (0, 4), color=colour, textcoords="offset points")
    else:
        axes.annotate(end, (epochs[-1], values[-1]), (5, 0), va="center", **text)


@styled
def examples(examples: Examples, *, width: float = WIDE) -> Figure:
    """The first 6 images, clean, triggered and their difference, with the predictions before and after.

    Args:
        examples: Images and predictions.
        width: Inches.
    """
    pictures, gain = examples.tiles()
    cell = width / MAX_SHOWN
    figure = Figure(figsize=(0.3 + cell * len(pictures), 1.4 + 3 * cell), layout="constrained")
    grid = figure.subplots(3, len(pictures), squeeze=False)
    for i, column in enumerate(grid.T):
        for axes, picture in zip(column, pictures[i], strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        column[0].set_title(printable(examples.class_names[examples.labels[i]], 14), size=8.5)
        for axes, outcomes in zip(column, examples.outcomes(i), strict=False):
            for line, (name, right, _) in enumerate(outcomes):
                caption = f"{'→ ' * line}{printable(name, 11)} {'✓' if right else '✗'}"
                put: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
                axes.annotate(caption, (0, 0), (0, -10 * line - 10), color=AFTER if right else BEFORE, size=8, **put)
    for axes, label in zip(grid[:, 0], ("clean", "with trigger", f"difference x{gain:.3g}"), strict=True):
        axes.set_ylabel(label)
    figure.supxlabel(
        "prediction before → after purification; ✓ true class, ✗ wrong", size=8, color=MUTED, x=0, ha="left"
    )
    return figure


def printable(text: str, limit: int, *, end: bool = False) -> str:
    """`text` as the font of the figures can draw it, of a long one the first (or last) `limit` characters."""
    text = "".join(c if ord(c) in _characters() and c.isprintable() else "?" for c in text)
    if len(text) <= limit:
        return text
    return f"…{text[1 - limit :]}" if end else f"{text[: limit - 1]}…"


@cache
def _characters() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())


def _shown_layers(layers: Sequence[NeuronLayer], marked: np.ndarray) -> list[NeuronLayer]:
    if len(layers) <= MAX_LAYERS:
        return list(layers)
    most = sorted(layers, key=lambda layer: -marked[layer.start : layer.stop].sum())[:MAX_LAYERS]
    return sorted(most, key=lambda layer: layer.start)


def _count_column(axes: Axes, layers: Sequence[NeuronLayer], marked: np.ndarray, done: str) -> None:
    """Writes how many neurons of each layer are marked, right of the strips."""
    edge = ("axes fraction", "data")
    put: dict[str, Any] = {"xycoords": edge, "textcoords": "offset points", "ha": "right"}
    for i, layer in enumerate(layers):
        count, total = int(marked[layer.start : layer.stop].sum()), len(layer)
        label, colour = f"{count:,} / {total:,}", BEFORE if count else MUTED
        axes.annotate(label, (1, i), (58, 0), color=colour, size=8, va="center", **put)
    axes.annotate(done, (1, -0.5), (58, 4), color=BEFORE, size=8, **put)


def _cut_off(axes: Axes, value: float) -> None:
    """Marks the score from which on neurons are marked, with its label on the roomier side."""
    axes.axvline(value, color=BEFORE, linewidth=0.8, linestyle=(0, (4, 2)))
    low, high = axes.get_xlim()
    side = "right" if value * value > low * high else "left"
    offset = (-2, 4) if side == "right" else (2, 4)
    axes.annotate(f"from {value:.3g}", (value, -0.5), offset, color=BEFORE, size=8, ha=side, textcoords="offset points")


def _log_axis(axes: Axes, x: np.ndarray) -> None:
    low, high = (x.min(), x.max()) if len(x) else (0.1, 1.0)
    axes.set(xscale="log", xlim=(low / 1.3, high * 1.3))
    # A range within two decades has too few powers of ten to read a value from.
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
