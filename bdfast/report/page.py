"""Turns the data of a report into its files, in memory: the HTML page and the figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
from matplotlib import image, rc_context
from matplotlib.figure import Figure

from bdfast._version import __version__
from bdfast.defenses.base import Defense
from bdfast.report import audit_figures, figures, landscape_figures
from bdfast.report.curves import curve, end, known, stages
from bdfast.report.examples import Examples
from bdfast.report.figures import percent

if TYPE_CHECKING:
    from bdfast.audits import Audit
    from bdfast.audits.landscape import Landscape
    from bdfast.defenses import PurifyResult
    from bdfast.evaluation import Metrics

HTML = "report.html"
FIGURES = tuple(
    f"{name}.png" for name in ("metrics", "weight_change", "accuracy", "sharpness", "path", "audit", "examples")
)
_NAMES = figures.METRICS | {
    "der": "Defense effectiveness (DER)",
    "rir": "Robustness improvement (RIR)",
}
_NONE, _MINUS = "\u2013", "\u2212"
_SYSTEM_FONTS = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@figures.styled
def render(
    *,
    title: str,
    before: Metrics | None,
    after: Metrics | None,
    result: PurifyResult,
    examples: Examples | None,
    landscape: Landscape | None,
    audit: Audit | None = None,
    facts: Mapping[str, str],
) -> dict[str, bytes]:
    """File name to content; the page comes last. Arguments as for `bdfast.report.write`."""
    scores = result.scores
    curves = {stage: curve(result.history, stage) for stage in ("unlearn", "fine-tune")}
    drawings: dict[str, Callable[..., Figure]] = {}
    if any(_value(metrics, key) is not None for metrics in (before, after) for key in figures.METRICS):
        drawings["metrics"] = partial(figures.metrics, before, after)
    if scores is not None and result.neurons is not None:
        drawings["weight_change"] = partial(
            figures.neuron_scores, scores, result.neurons, scored_by=result.scored_by, done=result.neurons_are
        )
    if any(curves.values()):
        drawings["accuracy"] = partial(figures.accuracy, result.history)
    if landscape is not None:
        drawings["sharpness"] = partial(landscape_figures.sharpness, landscape)
        drawings["path"] = partial(landscape_figures.path, landscape)
    if audit is not None and audit_figures.panels(audit):
        drawings["audit"] = partial(audit_figures.courses, audit)
    files = {f"{name}.png": _png(draw()) for name, draw in drawings.items()}
    if examples is not None:
        files["examples.png"] = _png(figures.examples(examples))

    context = {
        "version": __version__,
        "title": title,
        "headline": headline(before, after),
        "verdict": None if result.verdict is None else str(result.verdict),
        "warnings": result.warnings,
        "tiles": _tiles(before, after, result),
        "rows": _metric_rows(before, after),
        "pictures": {name: _picture(draw) for name, draw in drawings.items()},
        "layers": 0 if scores is None else len(scores.layers),
        "max_layers": figures.MAX_LAYERS,
        "marked": result.neurons_reset,
        "ranked": result.scored_by != Defense.scored_by,
        "scored_by": result.scored_by,
        "neurons_are": result.neurons_are,
        "unchanged": 0 if scores is None else int((~(scores.values > 0)).sum()),
        "stages": stages(result.history),
        "ends": {stage: end(parts) for stage, parts in curves.items()},
        "undone": not all(part.kept for part in curves["fine-tune"]),
        "landscape": landscape,
        "audit": audit,
        "audited": [] if audit is None else audit_figures.table(audit),
        "examples": None if examples is None else _examples(examples),
        "method": result.method,
        "options": result.options,
        "facts": facts,
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    template = (resources.files(__package__) / "report.html.j2").read_text(encoding="utf-8")
    # A lone surrogate, as in a file name that is not UTF-8, must not cost the user the report.
    files[HTML] = environment.from_string(template).render(context).encode("utf-8", "replace")
    return files


def headline(before: Metrics | None, after: Metrics | None) -> str:
    """The result in plain words, saying what was not measured."""
    worked, works = _value(before, "asr"), _value(after, "asr")
    had, has = _value(before, "acc"), _value(after, "acc")
    sentences = []
    if worked is not None and works is not None:
        still = "still " if works > worked / 2 else ""
        sentences.append(
            f"The trigger worked on {percent(worked)} of images; after purification it {still}works on "
            f"{percent(works)}."
        )
    elif works is not None:
        sentences.append(f"After purification the trigger works on {percent(works)} of images.")
    if had is not None and has is not None:
        sentences.append(f"Clean accuracy went from {percent(had)} to {percent(has)}.")
    elif has is not None:
        sentences.append(f"Clean accuracy is {percent(has)}.")
    if works is None:
        sentences.append("Whether a trigger still works was not measured.")
    return " ".join(sentences)


def duration(seconds: float) -> str:
    """75.2 as '1 min 15 s'."""
    if seconds < 9.95:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest}\u00a0s"
    if minutes < 60:
        return f"{minutes}\u00a0min {rest}\u00a0s"
    return f"{minutes // 60}\u00a0h {minutes % 60}\u00a0min"


def _value(metrics: Metrics | None, key: str) -> float | None:
    return known(getattr(metrics, key, None))


def _tiles(before: Metrics | None, after: Metrics | None, result: PurifyResult) -> list[dict[str, str]]:
    tiles = []
    for label, key in (("Trigger works on", "asr"), ("Clean accuracy", "acc")):
        old, new = _value(before, key), _value(after, key)
        if new is not None:
            note = "not measured before" if old is None else f"before: {percent(old)}"
            tiles.append({"label": label, "value": percent(new), "note": note})
    if (count := result.neurons_reset) and result.scores is not None:
        total = len(result.scores)
        note = f"of {total:,} neurons ({percent(count / total)})"
        tiles.append({"label": result.neurons_are.capitalize(), "value": f"{count:,}", "note": note})
    if "target" in result.found:
        tiles.append({"label": "Trigger leads to", "value": f"class {result.found['target']}", "note": "as inverted"})
    tiles.append({"label": "Time to purify", "value": duration(result.seconds), "note": ""})
    return tiles


def _metric_rows(before: Metrics | None, after: Metrics | None) -> list[dict[str, str]]:
    rows = []
    for key, name in _NAMES.items():
        old, new = _value(before, key), _value(after, key)
        if old is None and new is None:
            continue
        row = {"name": name, "old": _NONE, "new": _NONE, "change": "", "tone": ""}
        row |= {side: percent(value) for side, value in (("old", old), ("new", new)) if value is not None}
        # DER and RIR already compare two models, so a change of theirs would mean nothing.
        if old is not None and new is not None and key in figures.METRICS:
            points = round(100 * (new - old), 1)
            row["change"] = f"{points:+.1f}\u00a0pts".replace("-", _MINUS) if points else "none"
            better = points < 0 if key == "asr" else points > 0
            row["tone"] = "" if points == 0 else "better" if better else "worse"
        rows.append(row)
    return rows


def _examples(examples: Examples) -> dict[str, Any]:
    tiles, gain = examples.tiles()
    cards = [
        {
            "label": examples.class_names[examples.labels[i]],
            "images": [_pixels(pixels) for pixels in pictures],
            "rows": dict(zip(("clean", "with trigger"), examples.outcomes(i), strict=True)),
        }
        for i, pictures in enumerate(tiles)
    ]
    return {"cards": cards, "gain": gain, "total": len(examples)}


def _picture(draw: Callable[..., Figure]) -> dict[str, Any]:
    """A figure drawn for a desktop and for a phone, as URIs, with the size of the former in CSS pixels."""
    wide, narrow = draw(), draw(width=figures.NARROW)
    width, height = (round(96 * side) for side in wide.get_size_inches())
    return {"wide": _svg(wide), "narrow": _svg(narrow), "width": width, "height": height}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # Text stays text and names without a salt: small, sharp, and the same bytes for the same data.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "bdfast"}):
        figure.savefig(buffer, format="svg", dpi=200, transparent=True, metadata={"Date": None, "Creator": None})
    return _uri("image/svg+xml", buffer.getvalue().replace("'DejaVu Sans'", _SYSTEM_FONTS).encode())


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight", pad_inches=0.15)
    return buffer.getvalue()


def _pixels(pixels: Any) -> str:
    buffer = io.BytesIO()
    image.imsave(buffer, pixels, format="png")
    return _uri("image/png", buffer.getvalue())


def _uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
