"""What there is: the methods of every verb, with paper and options."""

from dataclasses import MISSING, dataclass, fields
from typing import Any

from bdfast import attacks, defenses
from bdfast.names import nearest


@dataclass(frozen=True)
class Method:
    """One method as users name it.

    Attributes:
        name: What to pass as `method=`.
        verb: "poison" or "purify".
        summary: First sentence of its documentation.
        options: Every option with its default.
    """

    name: str
    verb: str
    summary: str
    options: dict[str, Any]


_ROOMS: dict[str, dict[str, type]] = {"poison": {**attacks.METHODS}, "purify": {**defenses.METHODS}}


def list_methods(verb: str | None = None) -> list[Method]:
    """All methods, or those of one verb ("poison", "purify").

    Raises:
        ValueError: There is no such verb.
    """
    if verb is not None and verb not in _ROOMS:
        raise ValueError(f"verb: expected one of {', '.join(_ROOMS)}, got {verb!r}; {nearest(verb, _ROOMS)}")
    return [
        Method(name, room, " ".join((cls.__doc__ or "").split("\n\n")[0].split()), _options(cls))
        for room, methods in _ROOMS.items()
        if verb in (None, room)
        for name, cls in methods.items()
    ]


def _options(cls: type) -> dict[str, Any]:
    return {field.name: None if field.default is MISSING else field.default for field in fields(cls)}
