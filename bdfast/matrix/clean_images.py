"""The entries of a grid that say what the defender has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bdfast.matrix.options import number
from bdfast.matrix.places import Place
from bdfast.matrix.shares import RESERVE

NO_IMAGES = "none"


@dataclass(frozen=True, eq=False)
class Clean:
    """How many clean images the defender has: a share of the training images, 0 for none, or a number of each class."""

    share: float | None = None
    per_class: int | None = None
    place: str = ""

    @property
    def name(self) -> str:
        """As tables show it."""
        if self.share is None:
            return f"{self.per_class} a class"
        return f"{100 * self.share:.4g} %" if self.share else NO_IMAGES

    def content(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"share": self.share} if self.share is not None else {"per_class": self.per_class}


def clean_entry(value: Any, place: Place) -> Clean:
    """From `0.05`, `{per_class: 10}` or `none`.

    Raises:
        GridError: The share is more than the attacker leaves aside.
    """
    if value == NO_IMAGES:
        return Clean(share=0.0, place=str(place))
    if isinstance(value, dict):
        count = place.mapping(value, ["per_class"]).get("per_class")
        if type(count) is not int or count < 1:
            raise place["per_class"].error(f"expected a number of images, 1 or more, got {count!r}; 10 is usual.")
        return Clean(per_class=count, place=str(place))
    share = number(value)
    if share is None or not 0 < share <= RESERVE:
        raise place.error(
            f"expected a share of the training images above 0 and at most {RESERVE}, which is what is put aside for "
            f"the defender, {{per_class: 10}}, or none, got {value!r}; 0.05 is 5 %."
        )
    return Clean(share=share, place=str(place))
