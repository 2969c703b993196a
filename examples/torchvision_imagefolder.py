"""Purify a torchvision network with a folder of clean images, one sub-folder per class, and its own normalisation.

Without arguments it makes tiny images and a backdoored network; `--help` says how to give your own.
"""
# ruff: noqa: T201

import argparse
import tempfile
from pathlib import Path

import torch
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2
from torchvision.utils import save_image

import bdfast
from bdfast.io import load_into
from bdfast.models import normalized
from bdfast.training import fit


def read(folder: Path, size: int = 32) -> ImageFolder:
    """Images in [0, 1]; the network normalises them."""
    steps = v2.ToImage(), v2.Resize(size), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)
    return ImageFolder(folder, v2.Compose(steps))


def make_images(folder: Path, count: int) -> Path:
    """Noisy images of four classes: a bright quarter tells the class."""
    for label in range(4):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(count):
            image = 0.5 * torch.rand(3, 2, 16, 2, 16)
            image[:, label // 2, :, label % 2] += 0.3
            save_image(image.view(3, 32, 32), folder / f"class{label}" / f"{index}.png")
    return folder


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--own", nargs=2, type=Path, metavar=("IMAGES", "WEIGHTS"), help="clean images, and a state dict")
parser.add_argument("--arch", default="resnet18", help="a classifier of torchvision")
parser.add_argument("--size", type=int, default=32, help="pixels a side")
args = parser.parse_args()
torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    images, weights = args.own or (make_images(Path(folder, "clean"), 40), None)
    clean = read(images, args.size)
    network = get_model(args.arch, num_classes=len(clean.classes))
    model = normalized(network, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    test, triggered = clean, None
    if weights:
        load_into(network, weights)
    else:
        training, test = read(make_images(Path(folder, "train"), 60)), read(make_images(Path(folder, "test"), 20))
        attack = bdfast.BadNets(size=6, poison_rate=0.2)
        fit(model, bdfast.poisoned(training, attack), epochs=6, batch_size=32, lr=0.05)
        triggered = bdfast.Triggered(test, attack)
    result = bdfast.purify(model, clean, method="ft_sam", rho=0.5, lr=0.01, epochs=5, batch_size=32)
    print(f"before: {bdfast.evaluate(model, test, triggered)}\nafter: {bdfast.evaluate(result.model, test, triggered)}")
