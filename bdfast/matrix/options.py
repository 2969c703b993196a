"""Options of methods as a file gives them, brought to the types that their classes name."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import Any, Literal, Union

from bdfast.matrix.places import Place
from bdfast.methods import option_fields


def option_names(cls: type) -> list[str]:
    """The options of a method, but those that it fills in itself."""
    return [field.name for field in option_fields(cls) if field.init]


def defaults(cls: type, names: Collection[str]) -> dict[str, Any]:
    """The defaults of these options."""
    found = {}
    for field in fields(cls):
        if field.name in names:
            found[field.name] = field.default_factory() if field.default_factory is not MISSING else field.default
    return found


def typed_options(cls: type, given: dict[str, Any], place: Place) -> dict[str, Any]:
    """Options with the types that the class names: YAML has no tuples, and takes 1e-3 for a text.

    Raises:
        GridError: A value has another type; the message names the option.
    """
    try:
        hints = typing.get_type_hints(cls)
    except (NameError, TypeError, AttributeError):  # annotations of somebody else's class that cannot be resolved
        hints = {}
    typed = {}
    for name, value in given.items():
        try:
            typed[name] = _typed(value, hints.get(name, Any))
        except TypeError as error:
            raise place[name].error(f"expected {error}, got {value!r}; see the description of the option.") from error
    return typed


def number(value: Any) -> float | None:
    """A number as YAML gives it, or as a text such as 1e-3; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _typed(value: Any, hint: Any) -> Any:
    """Raises TypeError with what was expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(value, arguments)
    if origin is Literal:
        if value not in arguments:
            raise TypeError(f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        return _tuple(value, arguments)
    if hint is float:
        if (found := number(value)) is None:
            raise TypeError("a number")
        return found
    if hint in (int, bool, str) and type(value) is not hint:
        raise TypeError({int: "a whole number", bool: "true or false", str: "a text"}[hint])
    return value


def _one_of(value: Any, hints: tuple[Any, ...]) -> Any:
    expected = []
    for hint in hints:
        if hint is types.NoneType:
            if value is None:
                return None
            expected.append("null")
            continue
        try:
            return _typed(value, hint)
        except TypeError as error:
            expected.append(str(error))
    raise TypeError(" or ".join(expected))


def _tuple(value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise TypeError("a list")
    if len(hints) == 2 and hints[1] is Ellipsis:
        return tuple(_typed(part, hints[0]) for part in value)
    if hints and len(hints) != len(value):
        raise TypeError(f"a list of {len(hints)}")
    return tuple(_typed(part, hint) for part, hint in zip(value, hints, strict=True)) if hints else tuple(value)
