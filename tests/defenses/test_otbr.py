"""OTBR: which neurons it prunes, how it chooses gamma, networks of every kind, and what is refused."""

import copy
import sys

import pytest
import torch
from convolution_chain import Chain
from published_runs import batches
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import bdfast
from bdfast.data.augmentation import Augmentation
from bdfast.defenses.otbr import OTBRDefense
from bdfast.defenses.parts.noise import Noise
from bdfast.models import ModelSpec
from bdfast.neurons import NeuronIndex, NeuronScores, neuron_weight_change

pytest.importorskip("ot")

SHORT = {"unlearn_steps": 2, "unlearn_batch": 16, "unlearn_lr": 0.01}


def test_gamma_without_images_has_to_be_given():
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 3))
    with pytest.raises(ValueError, match="gamma: expected a share of the neurons, which nothing can choose"):
        bdfast.purify(model, None, method=OTBRDefense(image_shape=(8,), **SHORT))
    result = bdfast.purify(model, None, method=OTBRDefense(gamma=0.2, image_shape=(8,), **SHORT), amp=False)
    assert result.neurons_reset == 8  # of 40, as the logits are not pruned


def test_the_highest_changes_are_pruned_and_at_least_one():
    values = torch.tensor([0.1, 0.5, 0.5, 0.2, 0.50001])
    scores = NeuronScores(values, NeuronIndex(nn.Linear(2, 5)).layers)
    assert OTBRDefense().chosen(scores, 0.5).tolist() == [False, True, False, False, True]
    assert OTBRDefense(compat="official").chosen(scores, 0.5).tolist() == [False, True, True, False, False]
    assert OTBRDefense().chosen(scores, 0.01).tolist() == [False, False, False, False, True]


def test_noise_is_the_same_each_time_it_is_read():
    noise = Noise((3, 4, 4), 5, 300, seed=2)
    assert len(noise) == 300
    assert torch.equal(noise[7][0], noise[7][0])
    pixels = torch.stack([noise[number][0] for number in range(300)])
    assert pixels.min() >= 0
    assert 0.99 < pixels.max() <= 1
    assert {noise[number][1] for number in range(300)} == {0, 1, 2, 3, 4}
    assert not torch.equal(noise[7][0], Noise((3, 4, 4), 5, 300, seed=3)[7][0])


NETWORKS = {
    "resnet": {"arch": "preact_resnet18", "width": 4},
    "no BatchNorm": {"arch": "small_vgg11", "width": 4},
    "depthwise": {"arch": "small_mobilenet_v2", "width": 8},
    "attention": {"arch": "small_vit", "width": 16, "depth": 1},
}


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_networks_of_every_kind(kind):
    torch.manual_seed(0)
    model = ModelSpec(num_classes=3, **NETWORKS[kind]).build().eval()
    method = OTBRDefense(gamma=0.2, image_shape=(3, 32, 32), **{**SHORT, "unlearn_batch": 4})
    result = bdfast.purify(model, None, method=method, amp=False)
    assert result.model(torch.rand(2, 3, 32, 32)).isfinite().all()
    assert result.options["gamma"] == 0.2
    assert result.found["aligned_layers"] > 0
    assert result.scores is not None
    assert int(result.neurons.sum()) == int(0.2 * len(result.scores))
    last = list(model.named_parameters())[-2][0]
    assert last not in result.scores.by_layer()
    assert result.verdict is None


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv1d(1, 6, 3), nn.ReLU(), nn.Conv1d(6, 5, 3), nn.Flatten(), nn.Linear(20, 3)), (1, 8)),
        (nn.Sequential(nn.Conv3d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)), (1, 4, 4, 4)),
        (nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 5), nn.Linear(5, 3)), (8,)),
        (
            nn.Sequential(nn.Conv2d(2, 6, 3), nn.ConvTranspose2d(6, 5, 3, groups=1), nn.Flatten(), nn.Linear(80, 3)),
            (2, 4, 4),
        ),
    ],
    ids=["1-D", "3-D", "MLP", "transposed"],
)
def test_samples_of_other_shapes(model, shape):
    data = TensorDataset(torch.rand(12, *shape), torch.arange(12) % 3)
    for clean, image_shape in ((None, shape), (data, None)):
        method = OTBRDefense(gamma=0.3, image_shape=image_shape, **SHORT)
        result = bdfast.purify(model, clean, method=method, augment=None, amp=False)
        assert result.found["aligned_layers"] >= 2
        assert all(x.isfinite().all() for x in result.model.state_dict().values())


def test_frozen_layers_stay_and_fix_the_order():
    model = Chain().eval()
    model.conv2.weight.requires_grad_(False)
    method = OTBRDefense(gamma=0.3, image_shape=(2, 8, 8), **SHORT)
    result = bdfast.purify(model, None, method=method, amp=False)
    assert torch.equal(result.model.conv2.weight, model.conv2.weight)
    assert "conv2.weight" not in result.scores.by_layer()
    assert result.found["aligned_layers"] == 2  # conv3 and the classifier
    model.requires_grad_(False)
    model.linear.requires_grad_(True)
    with pytest.raises(ValueError, match="model: expected neurons that can be trained"):
        bdfast.purify(model, None, method=method)


def test_images_give_gamma_and_statistics(trained, clean):
    chosen = bdfast.purify(trained, clean, method=OTBRDefense(**SHORT), amp=False)
    gamma = chosen.options["gamma"]
    rows = [row for row in chosen.history if isinstance(row, bdfast.training.Probe)]
    assert [row.option for row in rows] == ["gamma"] * len(rows)
    assert len(rows) > 0
    before = trained.state_dict()
    if gamma is not None:
        before = bdfast.purify(trained, clean, method=OTBRDefense(gamma=gamma, **SHORT), amp=False).model.state_dict()
    for name, x in chosen.model.named_parameters():
        assert torch.equal(x, before[name])
    frozen = bdfast.purify(trained, clean, method=OTBRDefense(gamma=0.2, bn="frozen", **SHORT), amp=False).model
    moved = bdfast.purify(trained, clean, method=OTBRDefense(gamma=0.2, **SHORT), amp=False).model
    assert torch.equal(frozen[0].weight, moved[0].weight)
    assert torch.equal(frozen[1].running_mean, trained[1].running_mean)
    assert not torch.equal(moved[1].running_mean, trained[1].running_mean)


def test_the_scores_are_the_change_under_ascent_on_noise():
    torch.manual_seed(0)
    model = Chain().double().eval()
    result = bdfast.purify(
        model,
        None,
        method=OTBRDefense(gamma=0.1, image_shape=(2, 8, 8), **SHORT),
        amp=False,
        augment=Augmentation(shift=2),
    )
    unlearned = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(unlearned.parameters(), lr=0.01, momentum=0.9, maximize=True)
    for images, labels in batches(Noise((2, 8, 8), 4, 32, seed=0), 16, 1, "unlearn"):
        optimizer.zero_grad()
        F.cross_entropy(unlearned(images.double()), labels).backward()
        optimizer.step()
    expected = neuron_weight_change(unlearned, model, index=result.scores.index)
    torch.testing.assert_close(result.scores.values, expected.values, rtol=1e-6, atol=0)
    assert result.updates == 2


def test_what_is_refused(monkeypatch, clean):
    model = Chain().eval()
    with pytest.raises(ValueError, match="image_shape: expected the shape of an image"):
        bdfast.purify(model, None, method=OTBRDefense())
    with pytest.raises(ValueError, match="image_shape: expected input that the model takes"):
        bdfast.purify(model, None, method=OTBRDefense(gamma=0.1, image_shape=(3, 8, 8)))
    for options in ({"gamma": 0.0}, {"gamma": 1.5}, {"unlearn_steps": 0}, {"fusion": 1.1}, {"unlearn_batch": 1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
            OTBRDefense(**options)
    depthwise = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match="compat: expected convolutions without groups"):
        bdfast.purify(depthwise, None, method=OTBRDefense(gamma=0.1, compat="official", image_shape=(2, 8, 8)))
    model.conv2.weight.data.zero_()
    model.shortcut.weight.data.zero_()
    model.linear.weight.data.zero_()
    with pytest.raises(ValueError, match="model: expected neurons that unlearning changes"):
        bdfast.purify(
            model,
            None,
            method=OTBRDefense(gamma=0.1, image_shape=(2, 8, 8), **{**SHORT, "unlearn_steps": 1}),
            amp=False,
        )
    samples = [{"image": torch.rand(2, 8, 8), "label": 0}, {"image": torch.rand(2, 8, 8), "label": 1}] * 4

    def forward(network, batch):
        return network(batch["image"]), batch["label"]

    with pytest.raises(ValueError, match="clean: expected batches of"):
        bdfast.purify(Chain(), samples, method=OTBRDefense(gamma=0.1), forward=forward, augment=None)
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ValueError, match="pip install POT"):
        bdfast.purify(Chain(), None, method=OTBRDefense(gamma=0.1, image_shape=(2, 8, 8)))
