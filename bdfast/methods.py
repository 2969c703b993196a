"""Lists every method with its verb, paper and options; and takes in those of users."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, NamedTuple, TypeVar

from bdfast import attacks, audits, defenses, detectors, suppression
from bdfast.attacks import Attack
from bdfast.audits import AuditMethod
from bdfast.defenses import Defense
from bdfast.detectors import Detector
from bdfast.errors import nearest
from bdfast.suppression import Suppression


class _Verb(NamedTuple):
    methods: dict[str, Any]
    base: type


# The dictionaries of the packages themselves, so that a registered method is known wherever these are read.
_VERBS = {
    "poison": _Verb(attacks.METHODS, Attack),
    "detect": _Verb(detectors.METHODS, Detector),
    "purify": _Verb(defenses.METHODS, Defense),
    "suppress": _Verb(suppression.METHODS, Suppression),
    "audit": _Verb(audits.METHODS, AuditMethod),
}

Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class Method:
    """One method as users name it.

    Attributes:
        name: What to pass as `method=`.
        verb: "poison", "detect", "purify", "suppress" or "audit".
        summary: First sentence of its documentation.
        paper: Where it was published; empty where the class does not say.
        options: Every option with its default.
    """

    name: str
    verb: str
    summary: str
    paper: str
    options: dict[str, Any]


def list_methods(verb: str | None = None) -> list[Method]:
    """All methods, or those of one verb ("poison", "detect", "purify", "suppress", "audit"), registered ones included.

    Raises:
        ValueError: There is no such verb.
    """
    return [
        Method(name, room, _summary(cls), getattr(cls, "paper", ""), _options(cls))
        for room in (_VERBS if verb is None else [_known(verb)])
        for name, cls in _VERBS[room].methods.items()
    ]


def option_fields(cls: type) -> list[Field[Any]]:
    """The fields of a method that are its options; the trigger that a prepared attack carries is none."""
    return [field for field in fields(cls) if field.metadata.get("option", True)]


def register(verb: str, name: str) -> Callable[[Class], Class]:
    """Decorator that makes a method of your own known under `name`: to `purify`, the command line and the report.

        @bdfast.register("purify", "mine")
        @dataclass(frozen=True)
        class Mine(bdfast.defenses.Defense):
            lr: float = 0.01

            def run(self, model, clean, run):
                ...
                return bdfast.defenses.Outcome()

    The command line learns of it with `bdfast --import my_file.py purify mine ...`.

    Args:
        verb: "purify" for a `bdfast.defenses.Defense`, "detect" for a `bdfast.detectors.Detector`, "suppress" for a
            `bdfast.suppression.Suppression`, "audit" for a `bdfast.audits.AuditMethod`, "poison" for a
            `bdfast.attacks.Attack`.
        name: Lower-case letters, digits, "_" and "-".

    Raises:
        ValueError: The verb is unknown, or the name has other characters or is taken by another class.
        TypeError: The class is no frozen dataclass of that kind, or leaves out a method that it has to have.
    """
    methods, base = _VERBS[_known(verb)]
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ValueError(f"name: expected lower-case letters, digits, '_' and '-', got {name!r}; choose such a name.")

    def take_in(cls: Class) -> Class:
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise TypeError(
                f"{name}: expected a subclass of {base.__module__}.{base.__name__}, got {cls!r}; derive it."
            )
        if (
            not is_dataclass(cls)
            or "__dataclass_fields__" not in vars(cls)
            or not vars(cls)["__dataclass_params__"].frozen
        ):
            raise TypeError(
                f"{name}: expected a dataclass, whose fields are its options, got {cls.__name__}, which is none; put "
                "@dataclass(frozen=True) below @bdfast.register(...)."
            )
        if inspect.isabstract(cls):
            missing = ", ".join(sorted(cls.__abstractmethods__))
            raise TypeError(f"{name}: expected a class with all its methods, got one without {missing}; write them.")
        taken = methods.get(name)
        # A cell of a notebook that is run again defines the same class anew.
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"name: expected one that is free, got {name!r}, which is {taken.__name__}; take another.")
        methods[name] = cls
        return cls

    return take_in


def _known(verb: str) -> str:
    if verb not in _VERBS:
        raise ValueError(f"verb: expected one of {', '.join(_VERBS)}, got {verb!r}; {nearest(verb, _VERBS)}")
    return verb


def _summary(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _options(cls: type) -> dict[str, Any]:
    return {
        field.name: field.default_factory()
        if field.default_factory is not MISSING
        else None
        if field.default is MISSING
        else field.default
        for field in option_fields(cls)
    }
