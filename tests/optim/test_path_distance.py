"""The distance that PAM carries from step to step: used where it holds, measured anew where it may not."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bdfast import ops
from bdfast.optim import PAM

RHO = 0.5


def network(seed: int = 0, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def make(model: nn.Module, reference: nn.Module, base=torch.optim.SGD, **options) -> PAM:
    options = {"lr": 0.1, "momentum": 0.9, **options} if base is torch.optim.SGD else {"lr": 0.01}
    return PAM(model.parameters(), base, reference=reference.parameters(), rho=RHO, **options)


def backward(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 6, generator=generator).to(next(model.parameters()))
    F.cross_entropy(model(x).float(), torch.randint(3, (8,), generator=generator)).backward()


def train(model: nn.Module, optimizer: PAM, steps: range = range(2)) -> None:
    for seed in steps:
        optimizer.step(partial(backward, model, seed))


def length(optimizer: PAM) -> float:
    """How far the first half of a step moves the weights, which is rho if it knows their distance."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().double().clone() for param in params]
    optimizer.first_step(zero_grad=True)
    moved = torch.cat([(param.double() - x).flatten() for param, x in zip(params, before, strict=True)]).norm()
    optimizer.restore()
    return moved.item()


@pytest.fixture
def norms(monkeypatch) -> list[bool]:
    """Whether each step that is taken here knew its distance."""
    known = []

    def perturb_(*lists, norm=None, **options):
        known.append(norm is not None)
        return original(*lists, norm=norm, **options)

    original = ops.perturb_
    monkeypatch.setattr(ops, "perturb_", perturb_)
    return known


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"weight_decay": 0.1, "nesterov": True}], ids=str)
def test_it_is_carried_on_where_nobody_interferes(norms, options):
    model = network()
    optimizer = make(model, network(1), **options)
    train(model, optimizer, range(4))
    optimizer.state_dict()
    optimizer.first_step()
    optimizer.restore()  # brings them back
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    optimizer.zero_grad()
    [x.clone() for x in model.parameters()]
    train(model, optimizer, range(4, 5))
    assert norms == [False, True, True, True, True, True, True]
    assert length(optimizer) == pytest.approx(RHO, rel=1e-5)


def test_it_is_measured_in_every_step_of_another_base(norms):
    model = network()
    optimizer = make(model, network(1), torch.optim.AdamW)
    train(model, optimizer, range(3))
    assert norms == [False] * 3
    assert length(optimizer) == pytest.approx(RHO, rel=1e-5)


def swap_with_average(model: nn.Module) -> None:
    for param in model.parameters():
        average = param.detach() * 1.5
        param.data, average.data = average.data, param.data


def write_with_numpy(model: nn.Module) -> None:
    model[2].weight.detach().numpy()[1, 2] = 3


def turn(model: nn.Module) -> None:
    model[2].weight.data = model[2].weight.data.t()


def swap_memory(model: nn.Module) -> None:
    a, b = network(7, model[2].out_features)[2].weight, model[2].weight
    torch.utils.swap_tensors(a, b)


def set_one(model: nn.Module) -> None:
    model[0].weight.data[3, 4] = -2


def zero_a_neuron(model: nn.Module) -> None:
    model[2].weight.data[3] = 0
    model[2].bias.data[3] = 0


INTERFERENCES = {
    "scaled": lambda model: [param.data.mul_(3) for param in model.parameters()],
    "scaled in place": lambda model: torch.no_grad()(torch._foreach_mul_)(list(model.parameters()), 3.0),
    "clipped": lambda model: [param.data.clamp_(-0.05, 0.05) for param in model.parameters()],
    "one weight": set_one,
    "one neuron": zero_a_neuron,
    "the last bias": lambda model: model[4].bias.data[-1:].add_(2),
    "numpy": write_with_numpy,
    "average": swap_with_average,
    "turned": turn,
    "swapped": swap_memory,
    "reinitialised": lambda model: model[2].reset_parameters(),
    "loaded": lambda model: model.load_state_dict(network(9, model[2].out_features).state_dict()),
    "one flat vector": lambda model: nn.utils.vector_to_parameters(
        torch.zeros(sum(param.numel() for param in model.parameters())), model.parameters()
    ),
    "frozen": lambda model: model[2].requires_grad_(False),
    "other dtype": lambda model: model.bfloat16(),
}


CASES = [(what, 6) for what in INTERFERENCES]
# Of a large model some weights of each row are looked at.
CASES += [(what, 300) for what in INTERFERENCES if what not in ("one weight", "numpy")]


@pytest.mark.parametrize(("what", "width"), CASES)
def test_it_is_measured_where_somebody_has_interfered(what, width, norms):
    model = network(0, width)
    optimizer = make(model, network(1, width))
    train(model, optimizer, range(3))
    INTERFERENCES[what](model)
    norms.clear()
    assert length(optimizer) == pytest.approx(RHO, rel=0.02 if what == "other dtype" else 1e-4)
    assert norms == [False]
    optimizer.zero_grad()
    train(model, optimizer, range(3, 5))  # and it goes on; what is no block of memory is measured in each step
    assert norms == [False, False, what != "turned"]


def test_layers_that_are_frozen_and_freed_again():
    model = network()
    optimizer = make(model, network(1))
    for layer, trained in ((0, True), (0, False), (2, False), (0, True), (2, True)):
        model[layer].requires_grad_(trained)
        optimizer.zero_grad()
        train(model, optimizer, range(2))
        optimizer.zero_grad()
        assert length(optimizer) == pytest.approx(RHO, rel=1e-5)


def test_a_reference_that_is_moved():
    """Against the advice of the docstring."""
    model, reference = network(), network(1)
    optimizer = make(model, reference)
    train(model, optimizer)
    with torch.no_grad():
        reference[0].weight.mul_(3)
    assert length(optimizer) == pytest.approx(RHO, rel=1e-5)
    model[0].weight.data = reference[0].weight.data
    with pytest.raises(ValueError, match="reference: expected memory of its own"):
        optimizer.first_step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("weights_first", [True, False])
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(weights_first, dtype, tmp_path):
    """In 16 bits too, where the distance that is carried is not the one that is measured."""

    def start() -> tuple[nn.Module, PAM]:
        model = network().to(dtype)
        return model, make(model, network(1).to(dtype), lr=0.01)

    undisturbed, optimizer = start()
    train(undisturbed, optimizer, range(8))
    model, optimizer = start()
    train(model, optimizer, range(4))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    stored = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed, optimizer = start()
    train(resumed, optimizer, range(9, 10))
    optimizer.zero_grad()
    order = [(resumed, "model"), (optimizer, "optimizer")]
    for owner, name in order if weights_first else order[::-1]:
        owner.load_state_dict(stored[name])
    train(resumed, optimizer, range(4, 6))
    twin, other = copy.deepcopy((resumed, optimizer))
    train(twin, other, range(6, 8))
    train(resumed, optimizer, range(6, 8))
    for a, b, c in zip(resumed.parameters(), twin.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, c)


@pytest.mark.parametrize("other", ["weights", "reference", "dtype"])
def test_a_distance_of_others_is_not_taken_up(other):
    model, reference = network(), network(1)
    optimizer = make(model, reference)
    train(model, optimizer)
    stored = optimizer.state_dict()
    assert stored["param_groups"][0]["distance"]
    mine = network(4) if other == "weights" else copy.deepcopy(model)
    theirs = network(5) if other == "reference" else reference
    if other == "dtype":
        mine, theirs = mine.double(), copy.deepcopy(theirs).double()
    taken_up = make(mine, theirs)
    taken_up.load_state_dict(stored)
    assert length(taken_up) == pytest.approx(RHO, rel=1e-7 if other == "dtype" else 1e-5)
