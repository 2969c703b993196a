import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import bdfast
from bdfast.inversion.features import Features
from bdfast.inversion.generator import Generator
from bdfast.inversion.target_scan import easiest_class
from bdfast.models import PreActResNet18


class Planted(nn.Module):
    """Tells three classes by the brightest third of an image, unless the corner is lit: then it says 2."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))
        self.features = nn.Conv2d(1, 4, 1, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.tensor([1.0, 1.0, 1.0, 1.0]).view(4, 1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.features(images)
        thirds = torch.stack([part.mean((1, 2, 3)) for part in maps[..., :6].split(2, dim=3)], 1)
        corner = maps[:, :, -2:, -2:].mean((1, 2, 3))
        return self.scale * torch.cat([thirds[:, :2], (thirds[:, 2] + 2 * corner)[:, None]], 1)


def bars(count: int = 120):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = 0.1 * torch.rand(count, 1, 6, 8, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[..., 2 * label : 2 * label + 2] += 0.6
    return TensorDataset(images, labels)


def test_the_planted_trigger_is_found():
    model, clean = Planted(), bars()
    kept = copy.deepcopy(model.state_dict())
    model.train().features.weight.requires_grad_(False)
    generator_before = torch.get_rng_state()
    inversion = bdfast.invert_trigger(model, clean, options=bdfast.BTIDBF(epochs=30, image_bound=0.05), batch_size=40)
    assert inversion.target == 2
    assert min(inversion.evidence) == inversion.evidence[2]
    assert inversion.layer == "features"
    assert inversion.mask.shape == (1, 4, 6, 8)
    images, labels = clean.tensors
    with torch.no_grad():
        changed = inversion.generator(images[labels != 2])
        assert (model(changed).argmax(1) == 2).float().mean() > 0.9
    assert changed.min() >= images.min() - 1e-6
    assert changed.max() <= images.max() + 1e-6
    # Nothing has changed.
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model.scale.requires_grad
    assert not model.features.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), generator_before)
    assert not model.features._forward_hooks


def test_the_same_seed_finds_the_same():
    options = bdfast.BTIDBF(epochs=1, mask_epochs=1)
    first, again, other = (
        bdfast.invert_trigger(Planted(), bars(), options=options, seed=seed, batch_size=40) for seed in (0, 0, 1)
    )
    assert torch.equal(first.generator.pattern, again.generator.pattern)
    assert first.evidence == again.evidence
    assert not torch.equal(first.mask, other.mask)


def test_a_known_target_is_not_looked_for():
    options = bdfast.BTIDBF(target=1, epochs=20, mask_epochs=1, image_bound=0.2)
    inversion = bdfast.invert_trigger(Planted(), bars(), options=options, batch_size=40)
    assert inversion.target == 1
    assert inversion.evidence == []
    images, labels = bars().tensors
    with torch.no_grad():
        assert (Planted()(inversion.generator(images[labels != 1])).argmax(1) == 1).float().mean() > 0.5


def test_as_published_the_target_is_what_an_unled_generator_makes_of_most():
    options = bdfast.BTIDBF(detect="histogram", epochs=2, mask_epochs=1)
    inversion = bdfast.invert_trigger(Planted(), bars(), options=options, batch_size=40)
    assert sum(inversion.evidence) == pytest.approx(1)
    assert inversion.target == max(range(3), key=lambda label: inversion.evidence[label])


def test_the_scan_goes_on_until_something_is_reached():
    """A network that no change moves ends the search all the same."""
    images, labels = bars().tensors
    constant = torch.tensor([[0.0, 1.0, 2.0]])
    found = easiest_class(
        lambda x: constant + 0 * x.flatten(1)[:, :3],
        images,
        labels,
        3,
        limits=(0.0, 1.0),
        chunk=64,
        generator=torch.Generator().manual_seed(0),
    )
    assert found["target"] == 2
    assert len(found["evidence"]) == 3


def test_batchnorm_statistics_stay_where_they_are():
    torch.manual_seed(0)
    model = PreActResNet18(3, width=4, in_channels=1).train()
    kept = copy.deepcopy(model.state_dict())
    options = bdfast.BTIDBF(target=0, epochs=1, mask_epochs=1)
    images, labels = bars().tensors
    data = TensorDataset(torch.nn.functional.interpolate(images, size=(16, 16)), labels)
    bdfast.invert_trigger(model, data, options=options, batch_size=40, amp=False)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 33, 17), (3, 4, 4)])
def test_the_generator_starts_next_to_the_identity(shape):
    generator = Generator(shape, limits=(-1.0, 2.0))
    images = 3 * torch.rand(2, *shape) - 1
    changed = generator(images)
    assert changed.shape == images.shape
    assert 0 < (changed - images).abs().max() < 0.06
    with torch.no_grad():
        generator.pattern.fill_(100.0)
    torch.testing.assert_close(generator(images), torch.full_like(images, 2.0))


class Tokens(nn.Module):
    """Patches, then tokens of another size, then logits."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.mixer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixer(self.patches(x).flatten(2).mT).mean(1))


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (PreActResNet18(10, width=4), "layer4"),
        (Tokens(), "mixer"),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.ReLU(), nn.Linear(5, 2)), "2"),
    ],
    ids=["convolutions", "tokens", "flat"],
)
def test_the_last_feature_map(model, layer):
    images = torch.rand(2, 3, 16, 16)
    with Features(model, lambda: model(images)) as features:
        assert features.layer == layer
        logits = model(images)
        features.mask = torch.zeros(1, *features.values.shape[1:])
        assert not torch.equal(model(images), logits)
    assert torch.equal(model(images), logits)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(48, 3))

    def forward(self, x):
        return x.flatten(1) @ self.weight


def test_what_cannot_be_inverted_is_explained():
    rows = [{"pixels": torch.rand(1, 6, 8), "digit": i % 2} for i in range(4)]
    with pytest.raises(ValueError, match=r"clean: expected batches of \(images \[B, C, H, W\], labels\), got dict"):
        bdfast.invert_trigger(Planted(), rows, forward=lambda m, batch: (m(batch["pixels"]), batch["digit"]))
    with pytest.raises(ValueError, match="model: expected a module before the logits that runs once"):
        bdfast.invert_trigger(Bare(), TensorDataset(torch.rand(4, 1, 6, 8), torch.arange(4) % 2))
