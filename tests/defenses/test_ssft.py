"""SSFT: the choice of a skip and the fine-tuning around it, against loops that are written out by hand."""

import copy
import json

import pytest
import torch
from networks_with_skips import built, images, of_preact, skips_of
from published_runs import batches
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast import selection
from bdfast.data.batches import Batches
from bdfast.defenses import ssft, stages
from bdfast.defenses.parts.scaled_skips import scaled_sums, set_scaled_sums
from bdfast.defenses.ssft import SSFTDefense, freeze_others
from bdfast.models import PreActResNet18, SmallVGG, SmallViT
from bdfast.selection import Choice
from bdfast.task import default_forward, normalized
from bdfast.training import Run, fit
from bdfast.training.seeds import seeded


class Block(nn.Module):
    """A residual block with a projection as its skip, if it is to have one."""

    def __init__(self, *, projects: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.skip = nn.Conv2d(8, 8, 1) if projects else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.branch(x) + self.skip(x))


@pytest.fixture(scope="module")
def residual(digits):
    """A small network that knows the digits, with an identity and a projection."""
    with seeded(0, torch.device("cpu")):
        blocks = nn.Sequential(Block(projects=False), Block(projects=True))
        model = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), blocks, nn.Flatten(), nn.Linear(128, 10))
    fit(model, digits[0].subset(torch.arange(600)), epochs=4, batch_size=64, amp=False)
    return model.eval()


def colour_images(count: int = 24) -> TensorDataset:
    return TensorDataset(images(count=count), torch.arange(count) % 5)


def purified(model: nn.Module, data, **options):
    beside = {"amp": False, "augment": None, **options.pop("beside", {})}
    return bdfast.purify(model, data, method=SSFTDefense(**options), **beside)


@pytest.mark.parametrize(("block", "gamma"), [(3, 0.0), (4, 0.0), (3, 0.4)])
def test_the_published_run(block, gamma):
    """SGD on the stage around the block, with the others in place: block 3 is an identity, 4 a projection."""
    model, data = built(lambda: PreActResNet18(5, width=4)), colour_images()
    expected = copy.deepcopy(model).train()
    stage = expected.get_submodule(f"layer{block // 2 + 1}")
    fixed = {"0.shortcut.0.weight"} if block == 4 else set()
    params = [x for name, x in stage.named_parameters() if name not in fixed]
    optimizer = torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=5e-4)
    for pixels, labels in batches(data, 8, 10):
        optimizer.zero_grad()
        F.cross_entropy(of_preact(expected, pixels, block, gamma), labels).backward()
        optimizer.step()
    published = {**SSFTDefense.PUBLISHED, "gamma": gamma, "block": block}
    beside = {name: published.pop(name) for name in ("amp", "augment", "batch_size")}
    result = purified(model, data, **published, beside={**beside, "batch_size": 8})
    pixels = images(count=24)
    with torch.no_grad():
        actual, by_hand = result.model(pixels), of_preact(expected.eval(), pixels, block, gamma)
    assert float((actual - by_hand).abs().max()) < 1e-9
    assert float((by_hand - model(pixels).detach()).abs().max()) > 0.1
    start = dict(model.named_parameters())
    moved = {name for name, x in result.model.named_parameters() if not torch.equal(x, start[name])}
    assert {name.partition(".")[0] for name in moved} == {f"layer{block // 2 + 1}"}
    assert all(x.requires_grad for x in result.model.parameters())
    assert result.found["gamma"] == gamma
    assert (result.found["block"], result.found["trained"]) == (block, f"layer{block // 2 + 1}")


def test_weights_and_what_was_found_make_the_network_again(tmp_path):
    for block, held in ((3, {"layer2.1": [[0, 1, 1, 0.0]]}), (4, {})):
        model = built(lambda: PreActResNet18(5, width=4)).float()
        data = TensorDataset(images(count=24).float(), torch.arange(24) % 5)
        result = purified(model, data, block=block, lr=0.01, epochs=1)
        result.save(tmp_path)
        found = json.loads((tmp_path / "result.json").read_text())["found"]
        assert found["scaled_sums"] == held
        fresh = PreActResNet18(5, width=4).eval()
        bdfast.io.load_into(fresh, tmp_path / "model.safetensors")
        set_scaled_sums(fresh, found["scaled_sums"])
        pixels = images().float()
        assert torch.equal(fresh(pixels), result.model(pixels))
        assert scaled_sums(model) == {}


@torch.no_grad()
def test_the_change_of_answers(monkeypatch):
    """Half the distance of two histograms of the answers, of the unlearned copy, in eval mode."""
    model, exposed = (built(lambda: PreActResNet18(5, width=4)) for _ in range(2))
    pixels, labels = colour_images(12).tensors
    exposed.linear.bias -= exposed(pixels).mean(0)
    seen = []
    monkeypatch.setattr(ssft, "unlearned", lambda given, *_, **settings: seen.append((given, settings)) or exposed)
    defense = SSFTDefense(gamma=0.2, unlearn_to=0.3, unlearn_epochs=7)
    labels[5] = -100
    data = Batches(TensorDataset(pixels, labels), device="cpu", batch_size=10)
    skips = skips_of(model, pixels)
    changes = defense.changes(model, skips, data, Run(amp=False, forward=normalized(default_forward)))
    assert seen == [(model, {"to": 0.3, "epochs": 7})]
    counted = [i for i in range(12) if i != 5]
    for number, change in enumerate(changes):
        histograms = [[0] * 5, [0] * 5]
        for histogram, gamma in zip(histograms, (1.0, 0.2), strict=True):
            for i in counted:
                histogram[int(of_preact(exposed, pixels[i : i + 1], number, gamma).argmax())] += 1
        expected = sum(abs(a - b) for a, b in zip(*histograms, strict=True)) / 2 / len(counted)
        assert change == pytest.approx(expected, abs=1e-12)
    assert len(changes) == 8
    assert max(changes) > min(changes)
    assert scaled_sums(exposed) == {}


def test_the_skip_with_the_largest_change_is_taken(residual, clean, monkeypatch):
    for changes, block in (([0.4, 0.1], 0), ([0.1, 0.4], 1), ([0.2, 0.2], 0)):
        monkeypatch.setattr(SSFTDefense, "changes", lambda *_, changes=changes: changes)
        found = purified(residual, clean, lr=0.01, epochs=0).found
        assert (found["block"], found["module"]) == (block, f"2.{block}")


def test_with_a_rate_and_with_selection(residual, clean):
    result = purified(residual, clean, lr=0.01, updates=4)
    assert len(result.found["changes"]) == 2
    assert {row.stage for row in result.history if isinstance(row, bdfast.training.Epoch)} == {"unlearn", "fine-tune"}
    assert result.verdict is None
    result = purified(residual, clean, block=0, updates=2)
    assert result.verdict is not None
    assert result.options["lr"] in (None, *SSFTDefense.rates)


@pytest.mark.parametrize("block", [0, 1])
def test_where_no_stage_is_taken_the_given_network_comes_back(residual, clean, monkeypatch, block):
    monkeypatch.setattr(selection, "holds_images", lambda *_: False)  # without a search for surrogates
    monkeypatch.setattr(stages, "climb", lambda ladder, go_on, model, judge, *_, **__: Choice(None, judge.before))
    result = purified(residual, clean, block=block)
    assert (result.found["gamma"], result.found["scaled_sums"]) == (1.0, {})
    pixels = clean.batch(torch.arange(8))[0]
    assert torch.equal(result.model(pixels), residual(pixels))


def test_a_failed_run_in_place_leaves_the_network_as_it_was(residual, clean):
    model = copy.deepcopy(residual)
    with pytest.raises(FloatingPointError):
        purified(model, clean, block=0, lr=1e30, epochs=4, beside={"inplace": True})
    assert scaled_sums(model) == {}
    assert all(torch.equal(x, residual.state_dict()[name]) for name, x in model.state_dict().items())


def test_a_second_run_keeps_what_the_first_suppressed():
    model = built(lambda: SmallViT(5, image_size=16, width=8, depth=2))
    first = purified(model, colour_images(), block=2, lr=0.01, epochs=1).model
    second = purified(first, colour_images(), block=3, lr=0.01, epochs=1)
    assert {name: len(sums) for name, sums in scaled_sums(second.model).items()} == {"blocks.1": 2}
    assert second.found["trained"] == "blocks"


def test_networks_without_skips_are_refused_before_any_work(clean, monkeypatch):
    monkeypatch.setattr(stages, "Judge", lambda *_: pytest.fail("surrogates are searched for"))
    vgg = SmallVGG(5, depth=11, width=4)
    with pytest.raises(ValueError, match=r"^model: expected a residual network, .*, got no such sum .* SmallVGG; take"):
        purified(vgg, TensorDataset(images(count=24).float(), torch.arange(24) % 5))
    with pytest.raises(ValueError, match=r"^block: expected a number below 8, .*, got 8; choose one of these"):
        purified(built(lambda: PreActResNet18(5, width=4)), colour_images(), block=8)


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"block": -1}, "block: expected at least 0, got -1"),
        ({"gamma": 1.5}, r"gamma: expected a share in \[0, 1\], got 1.5"),
        ({"unlearn_lr": 0.0}, "unlearn_lr: expected a positive number"),
        ({"unlearn_to": 1.0}, "unlearn_to: expected a share"),
        ({"unlearn_epochs": 0}, "unlearn_epochs: expected at least 1"),
    ],
)
def test_options_out_of_range(options, start):
    with pytest.raises(ValueError, match=f"^{start}"):
        SSFTDefense(**options)


def test_where_all_is_frozen_around_the_skip_more_is_trained():
    model = nn.Sequential(nn.Identity(), built(lambda: PreActResNet18(5, width=4)))
    skips = skips_of(model, images())
    model[1].layer3.requires_grad_(False)
    assert freeze_others(copy.deepcopy(model), skips[0]) == "1.layer1"
    assert freeze_others(model, skips[4]) == "1"
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "layer3" not in name}


def test_batches_of_another_form(residual, digits):
    data = [{"pixels": x, "label": y} for x, y in zip(*digits[1].batch(torch.arange(40)), strict=True)]
    forward = lambda model, batch: (model(batch["pixels"]), batch["label"])  # noqa: E731
    result = purified(residual, data, lr=0.01, updates=2, beside={"forward": forward})
    assert len(result.found["changes"]) == 2
