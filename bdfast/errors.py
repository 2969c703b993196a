"""Suggestions for mistyped names."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known name that comes closest, or the advice to choose one."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    matches = get_close_matches(name.lower(), list(by_lower_case), n=1, cutoff=0.5)
    return f"did you mean {by_lower_case[matches[0]]!r}?" if matches else "choose one of these."
