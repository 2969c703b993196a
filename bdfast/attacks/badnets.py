"""BadNets: a small pattern at a fixed place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from bdfast.attacks.base import Attack

Corner = Literal["lower right", "lower left", "upper right", "upper left"]


@dataclass(frozen=True)
class BadNets(Attack):
    """Gu, Dolan-Gavitt and Garg, "BadNets" (arXiv 1708.06733, 2017).

    The pattern replaces the pixels below it.

    Attributes:
        size: Side of the pattern in pixels; a pattern of your own has its own.
        margin: Pixels between the pattern and the two borders of its corner; (vertical, horizontal) where they differ,
            so that every place can be reached.
        pattern: "square", "checkerboard" (the colour and black in turn), "cross" (the two diagonals), or rows of your
            own such as "1.1/.0./1.1": 1 gets the colour, 0 gets black, a point stays as it is.
        color: Grey level in [0, 1], or (red, green, blue).
        corner: Where the pattern is.
    """

    size: int = 3
    margin: int | tuple[int, int] = 0
    pattern: str = "square"
    color: float | tuple[float, float, float] = 1.0
    corner: Corner = "lower right"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {self.size}; the default is 3.")
        if len(self._margins()) != 2 or min(self._margins()) < 0:
            raise ValueError(
                f"margin: expected 0 or more pixels, or two such numbers, got {self.margin}; (2, 0) is two pixels from "
                "the lower border."
            )
        rows = self.rows()
        if not rows[0] or {*"".join(rows)} - {*"01."} or len({len(row) for row in rows}) > 1:
            raise ValueError(
                "pattern: expected square, checkerboard, cross or rows of equal length of 0, 1 and points, got "
                f"{self.pattern!r}; '101/010/101' has three rows."
            )
        if not all(0 <= value <= 1 for value in self._colors()) or len(self._colors()) not in (1, 3):
            raise ValueError(
                f"color: expected a grey level in [0, 1] or three of them, got {self.color}; (1.0, 0.0, 0.0) is red."
            )
        if self.corner not in get_args(Corner):
            raise ValueError(
                f"corner: expected lower or upper, then right or left, got {self.corner!r}; 'lower right' is the "
                "default."
            )

    def rows(self) -> list[str]:
        """The pattern as rows of 1 (colour), 0 (black) and points (unchanged)."""
        side = range(self.size)
        if self.pattern == "square":
            return ["1" * self.size] * self.size
        if self.pattern == "checkerboard":
            return ["".join("10"[(i + j) % 2] for j in side) for i in side]
        if self.pattern == "cross":
            return ["".join("1" if j in (i, self.size - 1 - i) else "." for j in side) for i in side]
        return self.pattern.split("/")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images [..., C, H, W] in [0, 1] -> a triggered copy.

        Raises:
            ValueError: The pattern does not fit the images, or it has three colours and they do not.
        """
        channels, height, width = images.shape[-3:]
        rows, (down, across), colors = self.rows(), self._margins(), self._colors()
        if len(rows) + down > height or len(rows[0]) + across > width:
            raise ValueError(
                f"size: expected a pattern that fits {height}x{width} pixels, got {len(rows)}x{len(rows[0])} and "
                f"margin {self.margin}; choose smaller ones."
            )
        if len(colors) > 1 and channels != len(colors):
            raise ValueError(
                f"color: expected a grey level for images with {channels} channels, got {self.color}; give one number."
            )
        top = down if self.corner.startswith("upper") else height - down - len(rows)
        left = across if self.corner.endswith("left") else width - across - len(rows[0])
        triggered = images.clone()
        below = triggered[..., top : top + len(rows), left : left + len(rows[0])]
        drawn = torch.tensor([[cell == "1" for cell in row] for row in rows], device=images.device)
        kept = torch.tensor([[cell == "." for cell in row] for row in rows], device=images.device)
        color = torch.tensor(colors, dtype=images.dtype, device=images.device).view(-1, 1, 1)
        below.copy_(torch.where(kept, below, color * drawn))
        return triggered

    def _margins(self) -> tuple[int, int]:
        return (self.margin, self.margin) if isinstance(self.margin, int) else self.margin

    def _colors(self) -> tuple[float, ...]:
        return tuple(self.color) if isinstance(self.color, tuple | list) else (self.color,)
