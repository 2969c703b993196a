"""A small network that the published code of OTBR takes."""

from torch import nn
from torch.nn import functional as F


class Chain(nn.Module):
    """Convolutions in the order of modules, as the published code wants them, and one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.shortcut = nn.Conv2d(6, 8, 1, bias=False)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 9, 3, padding=1, bias=False)
        self.linear = nn.Linear(9, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + self.shortcut(x))
        return self.linear(self.conv3(x).mean((2, 3)))
