"""Garments cut out of Fashion-MNIST, coloured, and laid on crops of photographs.

All in whole numbers and with random numbers whose stream NumPy promises to keep, so that every machine gets the same
bytes from the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

GARMENT, SIDE = 28, 32
"""Pixels a side of a garment, and of the picture that it is laid in."""
BACKGROUND = 6
"""Up to this grey value a pixel of Fashion-MNIST may be background."""
FEWEST_PIXELS, MOST_PIXELS = 4, 16
"""Pixels a side of a photograph that are averaged into one of a crop; drawn between these two."""
LEAST_CONTRAST, MOST_CONTRAST = 60, 120
"""How much brighter or darker than the photo under it a garment is, of 255; drawn between these two."""
CHUNK = 200
"""Images at a time; the result does not depend on it."""
DRAWS = ("photo", "scale", "top", "left", "mirror", "down", "right", "red", "green", "blue", "contrast")


def lay_on_photos(grey: Array, photos: Sequence[Array], seed: int) -> Array:
    """One picture for each garment, with a crop of a photo behind it.

    Photo, place and scale of the crop, place of the garment and its colour are drawn for each image.

    Args:
        grey: Garments [N, 28, 28] uint8, on 0.
        photos: Each [H, W, 3] uint8, of at least 128 pixels a side.
        seed: Of all that is drawn.

    Returns:
        [N, 3, 32, 32] uint8.

    Raises:
        ValueError: The garments have another size or dtype, there is no photo, or one is too small.
    """
    if grey.shape[1:] != (GARMENT, GARMENT) or grey.dtype != np.uint8:
        raise ValueError(
            f"grey: expected uint8 [N, {GARMENT}, {GARMENT}], got {grey.dtype} {list(grey.shape)}; pass Fashion-MNIST."
        )
    least = SIDE * FEWEST_PIXELS
    if not photos or min(min(photo.shape[:2]) for photo in photos) < least:
        raise ValueError(f"photos: expected some, all of at least {least} pixels a side; pass larger ones.")
    sums = [_corner_sums(photo) for photo in photos]
    drawn = draws(len(grey), seed)
    pictures = np.empty((len(grey), 3, SIDE, SIDE), np.uint8)
    for start in range(0, len(grey), CHUNK):
        part = slice(start, start + CHUNK)
        numbers = {name: values[part] for name, values in drawn.items()}
        laid = _lay(grey[part], _crops(sums, numbers), numbers)
        pictures[part] = laid.transpose(0, 3, 1, 2)
    return pictures


def draws(count: int, seed: int) -> dict[str, Array]:
    """What is drawn for each image: by name, [count] uint64 below 2**32."""
    # NumPy keeps the streams of its bit generators for good, but not what its distributions make of them.
    raw = np.random.PCG64(seed).random_raw((count, len(DRAWS))) >> np.uint64(32)
    return {name: raw[:, column] for column, name in enumerate(DRAWS)}


def below(drawn: Array, limit: Array | int) -> Array:
    """Numbers below 2**32 -> numbers in 0..limit - 1."""
    return (drawn * np.asarray(limit, np.uint64) >> np.uint64(32)).astype(np.int64)


def _corner_sums(photo: Array) -> Array:
    """[H, W, 3] -> [H + 1, W + 1, 3]: the sum of all that is above and to the left.

    It may exceed 32 bits and start again at 0; differences of less than 2**32 are right all the same.
    """
    sums = np.zeros((photo.shape[0] + 1, photo.shape[1] + 1, 3), np.uint32)
    sums[1:, 1:] = photo.cumsum(0, dtype=np.uint32).cumsum(1, dtype=np.uint32)
    return sums


def _crops(sums: Sequence[Array], drawn: dict[str, Array]) -> Array:
    """[N, 32, 32, 3] int32: squares of the photos, half of them mirrored, each pixel the mean of a smaller square."""
    which = below(drawn["photo"], len(sums))
    crops = np.empty((len(which), SIDE, SIDE, 3), np.int32)
    corners = np.arange(SIDE + 1)
    for number, table in enumerate(sums):
        members = (which == number).nonzero()[0]
        height, width = table.shape[0] - 1, table.shape[1] - 1
        most = min(MOST_PIXELS, min(height, width) // SIDE)
        scale = FEWEST_PIXELS + below(drawn["scale"][members], most - FEWEST_PIXELS + 1)
        top = below(drawn["top"][members], height - SIDE * scale + 1)
        left = below(drawn["left"][members], width - SIDE * scale + 1)
        rows = top[:, None] + scale[:, None] * corners
        columns = left[:, None] + scale[:, None] * corners
        at = table[rows[:, :, None], columns[:, None, :]]
        total = at[:, 1:, 1:] - at[:, :-1, 1:] - at[:, 1:, :-1] + at[:, :-1, :-1]
        area = (scale * scale).astype(np.uint32)[:, None, None, None]
        crops[members] = (total + area // 2) // area
    mirrored = below(drawn["mirror"], 2) == 1
    crops[mirrored] = crops[mirrored, :, ::-1]
    return crops


def _lay(grey: Array, behind: Array, drawn: dict[str, Array]) -> Array:
    """Garments [N, 28, 28] on [N, 32, 32, 3] int32 -> [N, 32, 32, 3] int32."""
    count = len(grey)
    small_shades, small_cover = cut_out(grey)
    rows = below(drawn["down"], SIDE - GARMENT + 1)[:, None] + np.arange(GARMENT)
    columns = below(drawn["right"], SIDE - GARMENT + 1)[:, None] + np.arange(GARMENT)
    places = (np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :])
    shades, cover = (np.zeros((count, SIDE, SIDE), np.int32) for _ in range(2))
    shades[places], cover[places] = small_shades, small_cover

    covered = (cover > 0)[..., None]
    under = (behind * covered).sum((1, 2)) // np.maximum(covered.sum((1, 2)), 1)
    paint = _colours(under, drawn).astype(np.int32)[:, None, None] * (128 + shades[..., None]) // 128
    return (paint.clip(0, 255) * cover[..., None] + behind * (8 - cover[..., None]) + 4) // 8


def cut_out(grey: Array) -> tuple[Array, Array]:
    """Where a garment is, and how bright it is there in comparison with its mean.

    Background is what is dark and connected with the border, or dark and at least 3x3 pixels large (the hole under the
    handle of a bag). Dark pixels of a print stay part of the garment.

    Args:
        grey: [N, 28, 28] uint8, on 0.

    Returns:
        Differences [N, 28, 28] int32 from the mean grey of the garment, and its cover [N, 28, 28] int32 in 0..8: 8
        inside, less at the outline, 0 outside.
    """
    dark = grey <= BACKGROUND
    cores = np.asarray(_around(dark, outside=True).all(0))
    holes = _around(cores, outside=False).any(0)
    garment = ~(_reached_from_border(dark) | (dark & holes))
    grey = grey.astype(np.int32)
    mean = (grey * garment).sum((1, 2)) // np.maximum(garment.sum((1, 2)), 1)
    mean = mean[:, None, None]
    padded = np.pad(garment.astype(np.int32), ((0, 0), (1, 1), (1, 1)))
    neighbours = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    outline = garment & (neighbours < 4)
    # At the outline Fashion-MNIST is a mixture with black, so a dark pixel there is one that is covered in part.
    cover = np.where(outline, np.minimum(4 + neighbours, 8 * grey // np.maximum(mean, 1)), 8) * garment
    shades = np.where(outline, np.maximum(grey - mean, 0), grey - mean)
    return shades * garment, cover


def _around(mask: Array, *, outside: bool) -> Array:
    """[N, H, W] bool -> [9, N, H, W]: the 3x3 neighbourhood of each pixel; `outside` the border."""
    height, width = mask.shape[1:]
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)), constant_values=outside)
    return np.stack([padded[:, row : row + height, column : column + width] for row in range(3) for column in range(3)])


def _reached_from_border(dark: Array) -> Array:
    """Dark pixels [N, 28, 28] that a path over dark pixels, not across corners, connects with the border."""
    floor = np.pad(dark, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    reached = np.zeros_like(floor)
    reached[:, [0, -1]] = reached[:, :, [0, -1]] = True
    while True:
        further = reached.copy()
        further[:, 1:] |= reached[:, :-1]
        further[:, :-1] |= reached[:, 1:]
        further[:, :, 1:] |= reached[:, :, :-1]
        further[:, :, :-1] |= reached[:, :, 1:]
        further &= floor
        if np.array_equal(further, reached):
            return reached[:, 1:-1, 1:-1]
        reached = further


def _colours(under: Array, drawn: dict[str, Array]) -> Array:
    """A colour [N, 3] for each garment, brighter than what is `under` it [N, 3] where that is dark, else darker."""
    colour = np.stack([below(drawn[name], 256) for name in ("red", "green", "blue")], 1)
    contrast = LEAST_CONTRAST + below(drawn["contrast"], MOST_CONTRAST - LEAST_CONTRAST + 1)
    behind = _brightness(under)
    wanted = np.where(behind < 128, behind + contrast, behind - contrast).clip(20, 235)[:, None]
    bright = _brightness(colour)[:, None]
    darker = colour * wanted // np.maximum(bright, 1)
    brighter = 255 - (255 - colour) * (255 - wanted) // np.maximum(255 - bright, 1)
    return np.where(bright > wanted, darker, brighter)


def _brightness(colours: Array) -> Array:
    """[N, 3] -> [N]: ITU-R BT.601, in 256ths."""
    return (77 * colours[:, 0] + 150 * colours[:, 1] + 29 * colours[:, 2]) // 256
