"""What the tests of audits share: images, networks, and a case as `audit` makes it."""

import copy
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional as F

import bdfast
from bdfast.audits import BatchStatisticsAudit, PathAudit, ReactivationAudit, RelearningAudit, RetuningAudit
from bdfast.audits.case import case_of
from bdfast.data.batches import Batches
from bdfast.data.images import ImageTensors
from bdfast.task import default_forward, normalized
from bdfast.training import Run
from bdfast.training.modes import eval_mode
from bdfast.training.seeds import seeded

CLASSES = 4
ATTACK = bdfast.BadNets(size=2, target=0, poison_rate=0.2)


QUICK = (
    BatchStatisticsAudit(),
    RetuningAudit(epochs=2, batch_size=32, lr=0.02),
    ReactivationAudit(epochs=2, batch_size=32, images=32, retuning=RetuningAudit(epochs=1)),
    PathAudit(points=3),
    RelearningAudit(updates=6, every=2, batch_size=32, lr=0.02),
)


def figures(result):
    """All that is stored but the time."""
    return {name: value for name, value in result.as_json().items() if name != "seconds"}


def pictures(count: int, seed: int) -> ImageTensors:
    """8 x 8, grey; the class is the bright row pair."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 100, (count, 1, 8, 8), generator=draws)
    for row in range(2):
        images[torch.arange(count), 0, 2 * labels + row, :5] += 90
    return ImageTensors(images.to(torch.uint8), labels)


def network(seed: int = 0) -> nn.Module:
    """Its images are cast to float64."""
    with seeded(seed, torch.device("cpu")):
        layers = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(384, CLASSES)]
        return nn.Sequential(*layers).double()


def trained(model: nn.Module, data: ImageTensors) -> nn.Module:
    images, labels = data.batch(torch.arange(len(data)))
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(images.double()), labels).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


def stale(model: nn.Module) -> nn.Module:
    """The same weights, with statistics that hide the trigger, which is the brightest thing in a picture."""
    hidden = copy.deepcopy(model)
    norm = hidden[1]
    norm.running_mean.add_(4 * norm.running_var.sqrt() * norm.weight.detach().sign())
    return hidden


def forgotten(model: nn.Module, data: ImageTensors) -> nn.Module:
    """A network that gives triggered images their own labels, trained with the trigger itself."""
    images, labels = data.batch(torch.arange(len(data)))
    both = torch.cat([images, ATTACK(images)]).double()
    copied = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.02, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(copied(both), labels.repeat(2)).backward()
        optimizer.step()
    copied.zero_grad()
    return copied.eval()


@contextmanager
def case_for(before, after, clean, shown=None, *, clean_model=None, batch_size=16):
    """A case with its run, as `audit` sets them up."""
    batches = Batches(clean, device="cpu", batch_size=batch_size)
    run = Run(forward=normalized(default_forward), amp=False)
    with seeded(0, batches.device), ExitStack() as stack:
        for model in (before, after, clean_model or after):
            stack.enter_context(eval_mode(model)).requires_grad_(False)
        yield (
            case_of(before, after, batches, run, triggered=shown, test=None, clean_model=clean_model, target=None),
            run,
        )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same(model: nn.Module, kept: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())
