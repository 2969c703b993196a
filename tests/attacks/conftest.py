import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from bdfast.attacks import InputAware, LabelConsistent, LowFrequency, PreparedAttack, TrojanNN
from bdfast.data import ImageTensors
from bdfast.training import fit
from bdfast.training.seeds import seeded

CLASSES = 4
SMALL = {
    "lf": LowFrequency(target=1, steps=40, images=40),
    "label_consistent": LabelConsistent(target=1, steps=4, poison_rate=0.15),
    "trojannn": TrojanNN(target=1, steps=60, images=32),
    "input_aware": InputAware(target=1, mask_steps=120, steps=6, width=4),
}


class Items(Dataset):
    """A plain data set: the slow path of everything that has a fast one for `ImageTensors`."""

    def __init__(self, data: ImageTensors) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        return self.data[index]


@pytest.fixture(scope="session")
def items() -> type[Items]:
    """Wraps an `ImageTensors` as a plain data set."""
    return Items


def shapes_of(count: int, size: tuple[int, int] = (28, 28), channels: int = 1, seed: int = 0) -> ImageTensors:
    """Each class is bright in another quarter of the image."""
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 100, (count, channels, height, width), generator=generator)
    down, right = torch.arange(height).view(-1, 1) * 2 // height, torch.arange(width) * 2 // width
    images += 40 * (down * 2 + right == labels.view(-1, 1, 1, 1))
    return ImageTensors(images.to(torch.uint8), labels)


def network_of(channels: int = 1) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    with seeded(0, torch.device("cpu")):
        layers = [*block(channels, 8), *block(8, 16), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, CLASSES)]
        return nn.Sequential(*layers)


@pytest.fixture(scope="session")
def small() -> dict[str, PreparedAttack]:
    """Every prepared attack, with options for small images and few seconds."""
    return SMALL


@pytest.fixture(scope="session")
def shapes():
    """(count, size, channels, seed) -> images that `network` can learn to tell apart."""
    return shapes_of


@pytest.fixture(scope="session")
def network():
    """(channels) -> a network with fresh weights."""
    return network_of


@pytest.fixture(scope="session")
def data() -> ImageTensors:
    return shapes_of(160)


@pytest.fixture(scope="session")
def trained(data) -> nn.Module:
    """A network that knows `data`, for reading only."""
    model = network_of()
    fit(model, data, epochs=4, batch_size=16, amp=False)
    return model.eval()


@pytest.fixture(scope="session")
def prepared(trained, data) -> dict[str, PreparedAttack]:
    """The attacks of `small` with their triggers."""
    return {name: attack.prepared(trained, data, seed=5) for name, attack in SMALL.items()}
