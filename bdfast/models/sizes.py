"""Checks of the sizes that networks are built with."""

from numbers import Integral


def check_sizes(**sizes: int) -> None:
    """Refuse what is no whole number of at least 1, before any memory is taken.

    Raises:
        ValueError: A size is something else.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {size!r}; give such a number.")
