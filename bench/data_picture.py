"""Writes docs/images/fashion-on-photos.png: six test images of each class. `python -m bench.data_picture`.

Only of images on photographs under CC BY 4.0 or CC0, so that the picture asks for no more than their authors' names.
"""

from pathlib import Path

import matplotlib
import torch

from bdfast.data.fashion_on_photos import TEST_SEED, fashion_on_photos_source
from bdfast.data.garments import below, draws
from bdfast.data.photos import PACKAGES

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "fashion-on-photos.png"
FREE = "lomiri-wallpapers-16.04"
"""The package whose photographs behind test images all have such a licence."""
EACH = 6


def free(count: int) -> torch.Tensor:
    """Which of the test images [count] are on a photograph of `FREE`: bool."""
    behind = [package for package, photos in PACKAGES.items() for _ in photos.test]
    drawn = below(draws(count, TEST_SEED)["photo"], len(behind))
    return torch.tensor([behind[number] == FREE for number in drawn])


def main() -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    test = fashion_on_photos_source().test
    allowed = free(len(test))
    names = test.class_names or ()
    figure, axes = pyplot.subplots(EACH, len(names), figsize=(len(names) * 0.84, EACH * 0.84 + 0.3), dpi=100)
    for label, name in enumerate(names):
        chosen = (allowed & (test.labels == label)).nonzero().flatten()[:EACH]
        axes[0, label].set_title(name, fontsize=8)
        for row, index in enumerate(chosen.tolist()):
            axes[row, label].imshow(test.images[index].permute(1, 2, 0), interpolation="nearest")
            axes[row, label].axis("off")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.93, wspace=0.06, hspace=0.06)
    figure.savefig(PICTURE, metadata={"Software": None})


if __name__ == "__main__":
    main()
