"""What triggers look like: writes docs/images/attacks-<name>.png, one for each attack.

    .venv/bin/python -m bench.attack_pictures  # those that need no network
    .venv/bin/python -m bench.attack_pictures --results attacks  # those that do, with the triggers of a run
    .venv/bin/python -m bench.attack_pictures wanet sig  # only these

On the left an image of Fashion-MNIST, on the right a photo that comes with scikit-learn. The triggers of attacks that
need a network fit one kind of images only: they come from the output folder of `bdfast matrix run
bench/grids/attacks.yaml`, and the image on the right is one of fashion-on-photos. Nothing is trained here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from sklearn.datasets import load_sample_image
from torch.nn import functional

from bdfast.attacks import METHODS, Attack, PreparedAttack
from bdfast.attacks.trigger_files import read_trigger
from bdfast.data.images import to_float, to_uint8
from bdfast.data.sources import load_source
from bdfast.matrix.images_by_name import data_facts
from bench.data_picture import free

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parent.parent / "docs" / "images"
PHOTO_SIZE = 64
FACTORS = (1, 2, 5, 10, 20, 50)

BAG = 8
DATA = ("fashion-mnist", "fashion-on-photos")


def bag(data: str) -> torch.Tensor:
    """The first bag of the test set, in colour one on a photograph under CC BY 4.0 or CC0: bright and dark areas."""
    test = load_source(data).test
    shown = free(len(test)) if data == "fashion-on-photos" else torch.ones(len(test), dtype=torch.bool)
    return test[int((shown & (test.labels == BAG)).nonzero()[0])][0]


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


def found(results: Path, name: str, data: str) -> PreparedAttack | None:
    """The attack of this name with the trigger that a run has found for these images; None where it has not."""
    digest = data_facts(data, load_source(data)).digest
    for path in sorted((results / "networks").glob("*.trigger.safetensors")):
        facts = json.loads(path.with_name(path.name.replace(".trigger.safetensors", ".json")).read_text())
        if facts["attack"]["kind"] == name and facts["data"] == digest:
            return read_trigger(METHODS[name](**facts["attack"]["options"]), path)
    return None


def draw(name: str, pairs: list[tuple[Attack, torch.Tensor]]) -> Path:
    cells = [panel for attack, image in pairs for panel in panels(attack, image)]
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


@dataclass(frozen=True)
class Pictures:
    """Attributes:
    names: Of attacks; all that can be drawn when left out.
    results: Output folder of a run with attacks that need a network; only those are drawn then.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    results: Path | None = None


def main() -> None:
    asked = tyro.cli(Pictures, description=__doc__)
    prepared = {name for name, attack in METHODS.items() if issubclass(attack, PreparedAttack)}
    for name in asked.names or METHODS:
        if (name in prepared) != (asked.results is not None):
            continue
        if asked.results is None:
            attack = METHODS[name]()
            pairs = [(attack, bag("fashion-mnist")), (attack, photo())]
        else:
            pairs = [(attack, bag(data)) for data in DATA if (attack := found(asked.results, name, data))]
        if not pairs:
            raise SystemExit(f"{name}: no trigger in {asked.results}")
        path = draw(name, pairs)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
