"""Where something stands in a grid file, so that an error can name the line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import yaml

from bdfast.errors import nearest


class GridError(ValueError):
    """Something in a grid file is wrong; the message names the line, what was expected, what came and what to do."""


@dataclass(frozen=True, eq=False)
class Place:
    """A place in a YAML file.

    Attributes:
        file: What the file is called in messages.
        root: The document.
        path: Keys and positions that lead from the document to the place.
    """

    file: str
    root: yaml.Node
    path: tuple[str | int, ...] = ()

    def __getitem__(self, step: str | int) -> Place:
        return replace(self, path=(*self.path, step))

    def __str__(self) -> str:
        steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path).lstrip(".")
        return f"{self.file}, line {self._line()}" + (f", {steps}" if steps else "")

    def error(self, problem: str) -> GridError:
        """The error to raise for a problem at this place."""
        return GridError(f"{self}: {problem}")

    def mapping(self, value: Any, known: Iterable[str]) -> dict[str, Any]:
        """`value`, which has to be a mapping with no other keys than `known`.

        Raises:
            GridError: It is something else; or it has another key, and the message names the nearest.
        """
        known = list(known)
        if not isinstance(value, dict):
            raise self.error(f"expected a mapping with keys of {', '.join(known)}, got {value!r}; write key: value.")
        for key in value:
            if key not in known:
                advice = nearest(str(key), known)
                raise self[str(key)].error(f"expected a key of {', '.join(known)}, got {key!r}; {advice}")
        return value

    def listed(self, value: Any) -> list[tuple[Any, Place]]:
        """The entries of a list, each with its place.

        Raises:
            GridError: It is no list, or an empty one.
        """
        if not isinstance(value, list) or not value:
            raise self.error(f"expected a list with at least one entry, got {value!r}; write [a, b].")
        return [(entry, self[index]) for index, entry in enumerate(value)]

    def _line(self) -> int:
        """Of the place, or of the last step towards it that the file has: keys of merged mappings stand elsewhere."""
        node, line = self.root, self.root.start_mark.line
        for step in self.path:
            if isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == step), None)
                if found is None:
                    break
                line, node = found[0].start_mark.line, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                line = node.start_mark.line
            else:
                break
        return line + 1


def read_yaml(text: str, file: str) -> tuple[Any, Place]:
    """The content of a YAML document, which is read without executing anything, and its place.

    Raises:
        GridError: It is no YAML, it is empty, or a mapping has a key twice, of which YAML would keep the last.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a date that the calendar has not.
        raise GridError(
            f"{file}: expected YAML, got something else ({' '.join(str(error).split())}); mend it."
        ) from error
    if root is None:
        raise GridError(f"{file}: expected a grid, got an empty file; docs/matrix.md shows one.")
    place = Place(file, root)
    _refuse_repeated_keys(root, file, set())
    return content, place


def _refuse_repeated_keys(node: yaml.Node, file: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias stands for the same node
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if key.value in keys:
                line = key.start_mark.line + 1
                raise GridError(f"{file}, line {line}: expected every key once, got {key.value!r} again; remove one.")
            if isinstance(key.value, str) and key.tag != "tag:yaml.org,2002:merge":
                keys.add(key.value)
            _refuse_repeated_keys(value, file, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated_keys(value, file, seen)
