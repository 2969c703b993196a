"""Writes docs/methods.md from bench/methods.md.j2 and the classes of the methods, so that no default can drift.

.venv/bin/python -m bench.methods_page
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import Field
from pathlib import Path
from typing import Any

from docstring_parser import parse
from jinja2 import Environment, StrictUndefined

from bdfast.defenses import METHODS, Defense, Staged
from bdfast.defenses.pruning import Pruning
from bdfast.files import whole_file
from bdfast.matrix.tables import DASH, markdown_table
from bdfast.methods import option_fields

HERE = Path(__file__).parent
TEMPLATE = HERE / "methods.md.j2"
PAGE = HERE.parent / "docs" / "methods.md"
SHARED = (Staged, Pruning)
"""The kinds of methods whose options the page describes once."""


def main() -> None:
    with whole_file(PAGE) as temporary:
        temporary.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(options=options, staged=shared(Staged), pruning=shared(Pruning), methods=_methods())


def options(name: str) -> str:
    """The options that a method has of its own, or with another value than the methods of its kind, as a table."""
    cls = METHODS[name]
    published = getattr(cls, "PUBLISHED", {})
    common = {field.name: field.default for base in SHARED if issubclass(cls, base) for field in option_fields(base)}

    def is_own(field: Field[Any]) -> bool:
        values = (field.default, published.get(field.name, field.default))
        return field.name not in common or any(value != common[field.name] for value in values)

    return _table(cls, list(filter(is_own, option_fields(cls))))


def shared(base: type[Defense]) -> str:
    """The options of a kind of methods, as a table."""
    return _table(base, option_fields(base))


def _table(cls: type[Defense], fields: Iterable[Field[Any]]) -> str:
    said = _descriptions(cls)
    published = getattr(cls, "PUBLISHED", {})
    lines = [
        [f"`{field.name}`", _value(field.default), _value(published.get(field.name, field.default)), said[field.name]]
        for field in fields
    ]
    if published:
        return markdown_table(["option", "default", "`PUBLISHED`", "meaning"], lines, names=4)
    return markdown_table(["option", "default", "meaning"], [[*line[:2], line[3]] for line in lines], names=3)


def _methods() -> str:
    """All methods with paper, class, and whether they have the published run."""
    lines = [
        [f"[`{name}`](#{name})", cls.paper, f"`{cls.__name__}`", "yes" if "PUBLISHED" in vars(cls) else DASH]
        for name, cls in METHODS.items()
    ]
    return markdown_table(["`method=`", "paper", "class", "`PUBLISHED`"], lines, names=4)


def _descriptions(cls: type) -> dict[str, str]:
    """Of every option, from the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for entry in parse(inspect.cleandoc(vars(base).get("__doc__") or "")).params:
            found[entry.arg_name] = " ".join((entry.description or "").split())
    return found


def _value(value: Any) -> str:
    return "left out" if value is None else f"`{value}`"


if __name__ == "__main__":
    main()
