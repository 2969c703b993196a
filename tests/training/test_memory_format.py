import pytest
import torch
from torch import nn

from bdfast.training.memory_format import channels_last_pays


@pytest.mark.parametrize(("channels", "used"), [(4, False), (8, True)])
def test_no_channels_last_where_torch_corrupts_memory(channels, used):
    """The backward pass of a strided 1x1 convolution of few channels, on a CPU with AVX2 alone."""
    model = nn.Sequential(nn.Conv2d(1, channels, 3), nn.Conv2d(channels, 8, 1, 2), nn.Flatten(), nn.Linear(72, 2))
    assert channels_last_pays(model, torch.device("cpu"), amp=False) is used
