"""BTI-DBF's `compat="official"` against a plain transcription of the published scripts, in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast.data.augmentation import Augmentation
from bdfast.data.batches import Batches
from bdfast.inversion.benign_mask import BenignMask
from bdfast.inversion.generator import Generator
from bdfast.training import Run
from bdfast.training.resumption import Checkpoints
from bdfast.training.seeds import derived_seed, seeded

BATCH, EPOCHS, SPREAD = 8, 3, 0.2
OPTIONS = bdfast.BTIDBF(
    **{**bdfast.BTIDBF.PUBLISHED, "mask_epochs": EPOCHS, "epochs": EPOCHS, "pretrain_epochs": EPOCHS}
)


class Suspect(nn.Module):
    """Features with BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


@pytest.fixture
def suspect():
    torch.manual_seed(1)
    model = Suspect().double().eval()
    model.features[1].running_mean.fill_(0.2)  # not what the images give, so that it shows who moves them
    return model


@pytest.fixture
def data():
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(36, 1, 8, 8, dtype=torch.float64, generator=draws)
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])  # exactly [0, 1]
    return TensorDataset(images, torch.randint(4, (36,), generator=draws))


def batches(data: TensorDataset, stage: str, epochs: int):
    for epoch in range(1, epochs + 1):
        seed = derived_seed(0, stage, epoch)
        torch.manual_seed(seed)
        yield from Batches(data, device="cpu", batch_size=BATCH).shuffled(seed)


def inverted(model: nn.Module, data: TensorDataset, bound: float):
    """The generator, the mask and the histogram. On images divided by 0.2, a distance is 25 times as large."""
    original, classifier = model, copy.deepcopy(model).eval().requires_grad_(False)
    torch.manual_seed(derived_seed(0, "invert", "weights"))
    mask = BenignMask(torch.Size([6, 8, 8])).double()
    generator = Generator([1, 8, 8], width=32).double()
    learnt = [parameter for name, parameter in generator.named_parameters() if name != "pattern"]

    optimizer = torch.optim.Adam(learnt, lr=1e-3)
    for x, _ in batches(data, "invert pretraining", EPOCHS):
        changed = generator(x)
        f, g = classifier.features(x), classifier.features(changed)
        distance = F.mse_loss(x, changed) / SPREAD**2
        weight = 100 if distance > 0.1 else 0.01
        answers = F.cross_entropy(classifier.head(f).softmax(1), classifier.head(g).softmax(1))
        loss = answers + F.mse_loss(f, g) + weight * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    optimizer = torch.optim.Adam([mask.z], lr=0.01)
    classifier.train()
    for x, y in batches(data, "invert mask", EPOCHS):
        m = mask.z.tanh() / 2 + 0.5
        f = classifier.features(x)
        loss = F.cross_entropy(classifier.head(m * f), y) - F.cross_entropy(classifier.head((1 - m) * f), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    m = (mask.z.tanh() / 2 + 0.5).detach()

    optimizer = torch.optim.Adam(learnt, lr=1e-3)
    classifier.eval()
    branches = set()
    for x, _ in batches(data, "invert", EPOCHS):
        changed = generator(x)
        f, g = classifier.features(x), classifier.features(changed)
        distance, benign = F.mse_loss(x, changed) / SPREAD**2, F.mse_loss(m * f, m * g)
        far = bool(distance > bound or benign > 3)
        branches.add(far)
        loss = distance if far else 0.01 * benign - F.mse_loss((1 - m) * f, (1 - m) * g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    counts = torch.zeros(4)
    draws = torch.Generator().manual_seed(derived_seed(0, "invert"))
    with torch.no_grad():
        for x, _ in Batches(data, device="cpu", batch_size=BATCH).ordered():
            noise = 0.03 * SPREAD * torch.randn(x.shape, generator=draws).double()
            counts += torch.bincount(original.eval()(generator(x + noise)).argmax(1), minlength=4)
    return generator, m, (counts / counts.sum()).tolist(), branches


@pytest.mark.parametrize("bound", [0.3, 0.00065])
def test_it_is_the_published_inversion(suspect, data, bound):
    kept = copy.deepcopy(suspect.state_dict())
    with seeded(0, torch.device("cpu")):
        generator, mask, evidence, branches = inverted(copy.deepcopy(suspect), data, bound)
    options = replace(OPTIONS, image_bound=bound * SPREAD**2)
    inversion = bdfast.invert_trigger(suspect, data, options=options, batch_size=BATCH, amp=False)
    actual, expected = inversion.generator.state_dict(), generator.state_dict()
    # Adam divides by gradients that are tiny here, and enlarges what rounding did to them.
    assert max(float((actual[name] - x).abs().max()) for name, x in expected.items()) < 1e-7
    assert (inversion.mask - mask).abs().max() < 1e-9
    assert inversion.evidence == evidence
    assert inversion.target == evidence.index(max(evidence))
    assert branches == ({False} if bound == 0.3 else {False, True})
    assert not inversion.generator.pattern.any()
    assert all(torch.equal(x, kept[name]) for name, x in suspect.state_dict().items())


class Killed(Exception):
    pass


@pytest.mark.parametrize("passes", [20, 50, 75, 94])
def test_a_killed_inversion_resumes_to_the_same_bits(suspect, data, tmp_path, passes):
    """Also where the statistics of the copy have moved: they are kept with the mask."""

    def run(folder, most=None):
        seen = []

        def forward(model, batch):
            seen.append(batch[0].detach())
            if most is not None and len(seen) > most:
                raise Killed
            return model(batch[0]), batch[1]

        with seeded(0, torch.device("cpu")):
            everything = Run(
                amp=False,
                forward=forward,
                augment=Augmentation(shift=1, flip=True),
                checkpoints=Checkpoints(tmp_path / folder, "run"),
            )
            found = OPTIONS.run(suspect, Batches(data, device="cpu", batch_size=BATCH), everything)
        return found, seen

    undisturbed, seen = run("undisturbed")
    assert passes < len(seen)
    with pytest.raises(Killed):
        run("killed", passes)
    resumed, seen_again = run("killed")
    assert all(torch.equal(x, y) for x, y in zip(seen[-5:], seen_again[-5:], strict=True))  # where the label is counted
    assert torch.equal(resumed.mask, undisturbed.mask)
    assert resumed.evidence == undisturbed.evidence
    expected = undisturbed.generator.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in resumed.generator.state_dict().items())
