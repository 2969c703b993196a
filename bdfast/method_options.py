"""Options of a method, which are the fields of a frozen dataclass: their checks, and a method by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from bdfast.errors import nearest
from bdfast.training.descriptions import number

Method = TypeVar("Method")


@dataclass(frozen=True)
class Checked:
    """Options that check themselves."""

    def check_share(self, *names: str, most: float = 1.0) -> None:
        """Refuse options outside [0, most].

        Raises:
            ValueError: Names the first such option.
        """
        for name in names:
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ValueError(f"{name}: expected a share in [0, {most:g}], got {value}; see its default.")

    def check_at_least(self, name: str, least: float) -> None:
        """Refuse an option below `least`; None passes.

        Raises:
            ValueError: Names the option.
        """
        value = getattr(self, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name}: expected at least {least:g}, got {value}; see its default.")

    def check_positive(self, *names: str) -> None:
        """Refuse options that are not above zero.

        Raises:
            ValueError: Names the first such option.
        """
        for name in names:
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}; see its default.")

    def check_one_of(self, name: str, *values: object) -> None:
        """Refuse an option that is none of these values.

        Raises:
            ValueError: Names the option.
        """
        value = getattr(self, name)
        if value not in values:
            known = ", ".join(map(repr, values))
            raise ValueError(f"{name}: expected one of {known}, got {value!r}; see its default.")


def method_of(
    method: str | Method, options: Mapping[str, Any], methods: Mapping[str, type[Method]], base: type[Any]
) -> Method:
    """A method from its name and options, or one that is given whole.

    Args:
        method: A name in `methods`, or an instance.
        options: By name, in place of defaults; only beside a name.
        methods: The methods of a verb.
        base: What all of them derive from.

    Raises:
        ValueError: There is no such method or option, or an option has a value that the method refuses.
        TypeError: `method` is neither a name nor such a method.
    """
    if not isinstance(method, str):
        if not isinstance(method, base):
            got = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
            raise TypeError(
                f"method: expected a name or a {base.__module__}.{base.__name__}, got {got}; pass a name "
                f"({', '.join(methods)}) or an instance."
            )
        if options:
            raise ValueError(
                f"method: expected its options inside {type(method).__name__}(...), got {', '.join(options)} "
                "beside it; put them there."
            )
        return method
    if method not in methods:
        names = ", ".join(methods)
        raise ValueError(f"method: expected one of {names}, got {method!r}; {nearest(method, methods)}")
    known = [field.name for field in fields(methods[method])]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise ValueError(
                f"{name}: expected an option of {method} ({', '.join(known) or 'none'}), got something else; "
                f"{nearest(name, known)}"
            )
    return methods[method](**{name: number(value) for name, value in options.items()})


def name_of(method: object, methods: Mapping[str, type[Any]]) -> str:
    """The name under which a method is known; one that is not registered goes by the name of its class."""
    return next((name for name, cls in methods.items() if type(method) is cls), type(method).__name__)
