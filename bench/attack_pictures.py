"""What triggers look like: writes docs/images/attacks-<name>.png, one for each attack.

    .venv/bin/python -m bench.attack_pictures  # all attacks
    .venv/bin/python -m bench.attack_pictures wanet sig  # only these

On the left an image of Fashion-MNIST from the data cache, on the right a photo that comes with scikit-learn. Attacks
that need a network are left out unless `READY` says how they get their trigger; nothing is trained here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_sample_image
from torch.nn import functional

from bdfast.attacks import METHODS, Attack, PreparedAttack
from bdfast.data.images import to_float, to_uint8
from bdfast.data.sources import demo_data

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parent.parent / "docs" / "images"
PHOTO_SIZE = 64
FACTORS = (1, 2, 5, 10, 20, 50)

# How an attack that needs a network gets a trigger for images of a shape [C, H, W]: name -> function.
READY: dict[str, Callable[[Attack, torch.Size], Attack]] = {}


def grey() -> torch.Tensor:
    """A bag of the test set: it has bright and dark areas."""
    test = demo_data().test
    return test[int((test.labels == 8).nonzero()[0])][0]


def photo() -> torch.Tensor:
    """The middle of scikit-learn's flower, [3, PHOTO_SIZE, PHOTO_SIZE]."""
    picture = to_float(torch.from_numpy(np.array(load_sample_image("flower.jpg"))).permute(2, 0, 1))
    side, width = picture.shape[1:]
    left = (width - side) // 2
    square = picture[None, :, :, left : left + side]
    small = functional.interpolate(square, (PHOTO_SIZE, PHOTO_SIZE), mode="bilinear", antialias=True)
    return to_float(to_uint8(small[0]))


def panels(attack: Attack, image: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Captions and images: clean, triggered, and their difference, amplified so that it can be seen."""
    triggered = to_float(to_uint8(attack(image)))
    difference = triggered - image
    largest = float(difference.abs().flatten().kthvalue(int(0.999 * image.numel())).values)
    factor = max(f for f in FACTORS if f == 1 or f * largest <= 0.5)
    return [
        ("image", image),
        ("triggered", triggered),
        (f"difference x {factor}", (0.5 + factor * difference).clamp(0, 1)),
    ]


def draw(name: str, images: list[torch.Tensor]) -> Path:
    cells = []
    for image in images:
        attack = METHODS[name]()
        cells += panels(READY[name](attack, image.shape) if name in READY else attack, image)
    figure, axes = plt.subplots(1, len(cells), figsize=(1.6 * len(cells), 1.9), dpi=110)
    for axis, (caption, image) in zip(axes, cells, strict=True):
        axis.imshow(image.permute(1, 2, 0).squeeze(2), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(caption, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.02, top=0.87, wspace=0.04)
    path = IMAGES / f"attacks-{name}.png"
    # Without metadata the file changes only where the picture does.
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return path


def main(names: list[str]) -> None:
    images = [grey(), photo()]
    for name in names or METHODS:
        if issubclass(METHODS[name], PreparedAttack) and name not in READY:
            print(f"{name}: left out, it needs a network")
            continue
        path = draw(name, images)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
