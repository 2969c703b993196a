"""The projection that FST and D3 share, and what holds for both."""

import copy

import pytest
import torch
from linear_heads import BATCH, images, network, norm_of
from torch import nn
from torch.utils.data import TensorDataset

import bdfast
from bdfast.data.batches import Batches
from bdfast.defenses.d3 import D3Defense
from bdfast.defenses.fst import FSTDefense
from bdfast.defenses.parts.sphere import project_, random_point
from bdfast.models.vit import SmallViT
from bdfast.training import Probe, Run
from bdfast.training.seeds import seeded

BOTH = pytest.mark.parametrize("cls", [FSTDefense, D3Defense])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_weight_is_projected_along_its_direction(dtype, scale):
    start = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = (scale * start).to(dtype)
    expected = weight.double() * (2.5 / norm_of(weight))
    project_(weight, 2.5)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(weight.double(), expected, rtol=tolerance, atol=0)
    assert norm_of(weight) == pytest.approx(2.5, rel=tolerance)


def test_zeros_stay_zeros_and_a_radius_of_zero_makes_them():
    weight = nn.Parameter(torch.zeros(3, 4))
    project_(weight, 2.0)
    assert not weight.any()
    weight = nn.Parameter(torch.ones(3, 4))
    project_(weight, torch.tensor(0.0))
    assert not weight.any()
    assert weight.requires_grad


def test_a_random_point_lies_on_the_sphere_and_is_the_same_in_every_precision():
    def draw(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        return random_point(torch.zeros(20, 30, dtype=dtype), 3.0, torch.Generator().manual_seed(seed))

    point, state = draw(torch.float64), torch.get_rng_state()
    assert norm_of(point) == pytest.approx(3.0, rel=1e-14)
    assert abs(float(point.mean())) < 0.02
    assert draw(torch.float32).dtype == torch.float32
    torch.testing.assert_close(draw(torch.float32).double(), point, rtol=1e-6, atol=0)
    assert not torch.equal(draw(torch.float64, seed=1), point)
    assert torch.equal(torch.get_rng_state(), state)


class Tied(nn.Module):
    """The classifier has the weight of a layer before it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.first(x.flatten(1)).relu())


class Named(nn.Module):
    """The classifier under two names, which is one layer all the same."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(16, 8)
        self.head = self.fc = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return {"logits": self.head(self.body(x.flatten(1)).relu())}


def small(kind: str) -> nn.Module:
    with seeded(0, torch.device("cpu")):
        return {
            "vit": lambda: SmallViT(3, image_size=4, width=8, depth=1, heads=2, in_channels=1, patch_size=2),
            "plain": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
            "named": Named,
            "root": lambda: nn.Linear(16, 3),
            "3d": lambda: nn.Sequential(nn.Conv3d(1, 2, (1, 2, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)),
            "1d": lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(30, 3)),
        }[kind]()


SHAPES = {"3d": (1, 1, 4, 4), "1d": (1, 16), "root": (16,)}


@BOTH
@pytest.mark.parametrize("kind", ["vit", "plain", "named", "root", "3d", "1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_of_every_kind_keep_the_norm(cls, kind, dtype):
    pixels, labels = images().tensors
    data = TensorDataset(pixels.reshape(-1, *SHAPES.get(kind, (1, 4, 4))).to(dtype), labels)
    model = small(kind).to(dtype)
    result = bdfast.purify(model, data, method=cls(lr=0.05, epochs=2), batch_size=BATCH, amp=False)
    name = {"vit": "head.weight", "named": "head.weight", "root": "weight"}.get(kind, "3.weight")
    before, after = (network.get_parameter(name).detach() for network in (model, result.model))
    assert after.dtype == dtype
    assert norm_of(after) == pytest.approx(norm_of(before), rel=1e-6 if dtype == torch.float32 else 1e-2)
    assert float(torch.cosine_similarity(before.double().flatten(), after.double().flatten(), 0)) < 0.5
    assert all(parameter.requires_grad for parameter in result.model.parameters())


@BOTH
@pytest.mark.parametrize("lr", [None, 0.01])
def test_networks_without_a_classifier_of_their_own_are_refused(cls, lr, monkeypatch):
    """Before surrogate triggers are looked for, and with everything as it was."""

    def refused(model: nn.Module, message: str) -> None:
        before = copy.deepcopy(model.state_dict())
        classes = 16 if isinstance(model, Tied) else 3
        pixels, labels = images(classes=classes).tensors
        with pytest.raises(ValueError, match=message):
            bdfast.purify(
                model, TensorDataset(pixels.float(), labels), method=cls(lr=lr), batch_size=BATCH, inplace=True
            )
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    def searched(*_, **__):
        raise AssertionError("the search for surrogate triggers has begun")

    monkeypatch.setattr("bdfast.defenses.stages.Judge", searched)
    pooled = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    refused(pooled, "linear layer whose outputs are the logits, got none")
    refused(nn.Sequential(small("plain"), nn.LogSoftmax(1)), "linear layer whose outputs are the logits, got none")
    refused(Tied(), r"first\.weight as well; give")
    frozen = small("plain")
    frozen[3].weight.requires_grad_(False)
    refused(frozen, r"3\.weight, which is frozen; call requires_grad_")
    computed = small("plain")
    nn.utils.parametrizations.weight_norm(computed[3])
    refused(computed, r"3\.weight, which is computed in every pass; .*remove_parametrizations")
    zero = small("plain")
    nn.init.zeros_(zero[3].weight)
    refused(zero, r"got zeros in 3; load")


@BOTH
def test_the_strength_is_found_on_held_out_images(cls):
    pixels, labels = images(classes=2).tensors
    data = TensorDataset(pixels.float(), labels)
    result = bdfast.purify(network(classes=2).float(), data, method=cls(updates=10), batch_size=BATCH, amp=False)
    chosen = [row.value for row in result.history if isinstance(row, Probe) and row.chosen]
    assert chosen in ([], [result.options["lr"]])
    assert result.verdict.held_out == 10
    assert result.options["distill"] == 0


def dicts() -> list[dict]:
    """Images in which no surrogate triggers are looked for."""
    pixels, labels = images().tensors
    return [{"pixels": x, "label": int(y)} for x, y in zip(pixels, labels, strict=True)]


def of_dicts(model, batch):
    return model(batch["pixels"]), batch["label"]


@BOTH
def test_the_classifier_is_replaced_once_and_stages_go_on_from_there(cls, monkeypatch):
    restarted, started = [], []
    restart, fine_tune = cls.restart, cls.fine_tune

    def watched_restart(self, layer, *rest):
        restart(self, layer, *rest)
        restarted.append(layer.weight.detach().clone())

    def watched_fine_tune(self, model, *rest, **more):
        started.append((self.lr, model[4].weight.detach().clone()))
        fine_tune(self, model, *rest, **more)
        assert norm_of(model[4].weight) == pytest.approx(norm_of(network()[4].weight), rel=1e-12)

    monkeypatch.setattr(cls, "restart", watched_restart)
    monkeypatch.setattr(cls, "fine_tune", watched_fine_tune)
    defense = cls(updates=10, max_accuracy_drop=1.0)
    result = bdfast.purify(network(), dicts(), method=defense, batch_size=BATCH, amp=False, forward=of_dicts)
    assert [rate for rate, _ in started] == list(cls.rates)
    assert result.options["lr"] == cls.rates[-1]
    assert len(restarted) == 1
    assert torch.equal(started[0][1], restarted[0])
    assert not torch.equal(started[1][1], restarted[0])


@BOTH
def test_one_stage_keeps_the_accuracy_and_leaves_the_classifier_behind(cls, digits, trained):
    before = trained[4].weight.detach().clone()
    result = bdfast.purify(trained, digits[1], method=cls(lr=0.1), amp=False, augment=None)
    test = Batches(digits[2], device="cpu")
    assert Run(amp=False).accuracy(result.model, test) > Run(amp=False).accuracy(trained, test) - 0.2
    assert float((result.model[4].weight.detach() * before).sum() / before.square().sum()) < 0
    assert torch.equal(trained[4].weight, before)
    assert result.verdict is None


@BOTH
def test_one_class_gives_finite_weights_and_a_warning(cls):
    pixels, labels = images().tensors
    data = TensorDataset(pixels, torch.zeros_like(labels))
    with pytest.warns(UserWarning, match="expected images of several classes, got one only"):
        result = bdfast.purify(network(), data, method=cls(lr=0.05, epochs=2), batch_size=BATCH, amp=False)
    assert all(bool(value.isfinite().all()) for value in result.model.state_dict().values())
