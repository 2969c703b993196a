"""What the trigger of each attack that makes it with a network looks like, and does to that network."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import bdfast
from bdfast.attacks import InputAware, LabelConsistent, LowFrequency, PreparedAttack, TrojanNN
from bdfast.data import ImageTensors
from bdfast.data.images import to_float, to_uint8


def target_rate(model: nn.Module, data: ImageTensors, attack: PreparedAttack) -> float:
    images = data.batch((data.labels != attack.target).nonzero().squeeze(1))[0]
    with torch.no_grad():
        return float((model(attack(images)).argmax(1) == attack.target).float().mean())


def test_lf_is_smooth_and_leads_to_the_target(trained, prepared, shapes):
    attack = prepared["lf"]
    pattern = attack.state["pattern"]
    assert float(pattern.min()) == 0
    assert float(pattern.max()) == pytest.approx(attack.amplitude)
    # Mirrored, so that its borders make no edge when it is repeated.
    mirrored = torch.cat([pattern, pattern.flip(1)], 1)
    mirrored = torch.cat([mirrored, mirrored.flip(2)], 2)
    energy = torch.fft.fft2(mirrored - mirrored.mean()).abs().square()
    frequency = torch.fft.fftfreq(56).abs()
    high = torch.maximum(frequency.view(-1, 1), frequency) > 0.25
    assert float(energy[..., high].sum() / energy.sum()) < 0.01
    images = torch.full((1, 1, 28, 28), 0.5)
    torch.testing.assert_close(attack(images) - images, pattern[None])
    test = shapes(80, seed=1)
    noise = attack.with_state({"pattern": torch.zeros_like(pattern)})
    assert target_rate(trained, test, attack) > target_rate(trained, test, noise) + 0.3


def test_trojannn_excites_its_neurons_with_a_square(trained, prepared, shapes):
    attack = prepared["trojannn"]
    assert attack.state["mask"].sum() == 7 * 7  # 7 % of 28 x 28 pixels
    assert attack.state["mask"][-7:, -7:].all()
    images = shapes(40, seed=1).batch(torch.arange(40))[0]
    triggered = attack(images)
    assert torch.equal(triggered[..., :21, :], images[..., :21, :])
    assert (triggered[..., -7:, -7:] == triggered[:1, :, -7:, -7:]).all()
    grey = images.clone()
    grey[..., -7:, -7:] = 0.5
    with torch.no_grad():
        clean, plain, excited = (trained[:-1](x)[:, attack.state["neurons"]].mean() for x in (images, grey, triggered))
    assert excited > 1.2 * max(clean, plain)


def test_trojannn_needs_a_linear_layer_at_the_end(network, data):
    ends = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="network: expected one whose logits come from a linear layer"):
        TrojanNN().prepare(ends, data)
    with pytest.raises(ValueError, match="neurons: expected at most 64, the inputs of the last layer, got 65"):
        TrojanNN(neurons=65).prepare(network(), data)


def test_input_aware_triggers_differ_and_are_small(prepared, shapes):
    attack = prepared["input_aware"]
    images = shapes(40, seed=1).batch(torch.arange(40))[0]
    patterns, masks = attack.trigger(images)
    assert patterns.shape == (40, 1, 28, 28)
    assert masks.shape == (40, 1, 28, 28)
    assert patterns.dtype == masks.dtype == torch.float64
    assert 0.5 * attack.mask_density < float(masks.mean()) < 1.5 * attack.mask_density
    apart = torch.pdist(masks.flatten(1).round()).view(-1)
    assert (apart > 0).float().mean() > 0.9
    assert (torch.pdist(patterns.flatten(1)) > 1e-3).all()
    generator = torch.Generator().manual_seed(0)
    crossed = attack.cross(images[0], images[1], generator)
    expected = images[0] + (patterns[1] - images[0]) * masks[1]
    torch.testing.assert_close(crossed, expected.float())
    assert attack.cross_count(10) == 5
    assert replace(attack, cross_rate=1.0).cross_count(10) == 10


def test_label_consistent_images_are_near_and_hard(trained, data, prepared):
    attack = prepared["label_consistent"]
    chosen = (data.labels == 1).nonzero().squeeze(1)
    images, labels = data.batch(chosen)
    poison = to_uint8(attack.poison(images, labels)).int()
    inner = (..., slice(3, -3), slice(3, -3))
    stored = attack.poison(images, labels) - images  # the pattern hides the rest of the change in the corners
    length = stored[inner].square().sum((1, 2, 3)).sqrt()
    # Half a level of rounding in each pixel comes on top.
    assert length.max() < (attack.eps + 0.5 / 255) * 28
    assert length.min() > 0.5 * attack.eps * 28
    # Full amplitude makes each corner pixel black or white, the left corners mirror the right ones.
    corner = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]])
    for rows in (slice(3), slice(-3, None)):
        assert (poison[..., rows, -3:] == corner).all()
        assert (poison[..., rows, :3] == corner.flip(1)).all()
    with torch.no_grad():
        stored = to_float(attack.state["images"])
        assert (trained(stored).argmax(1) == 1).float().mean() < (trained(images).argmax(1) == 1).float().mean() - 0.2
    triggered = attack(images)
    assert torch.equal(triggered[inner], images[inner])
    assert torch.equal(to_uint8(triggered)[..., :3, -3:].int(), corner.expand(len(images), 1, 3, 3))


def test_label_consistent_reduced_amplitude_is_added(prepared):
    attack = replace(prepared["label_consistent"], amplitude=0.25)
    change = attack(torch.full((1, 28, 28), 0.5)) - 0.5
    assert sorted(change.unique().tolist()) == [-0.25, 0.0, 0.25]
    assert torch.equal(change[0, :3, :3], change[0, -3:, :3])


def test_label_consistent_knows_its_images_only(trained, data, prepared, network, shapes):
    attack = prepared["label_consistent"]
    images, labels = data.batch(torch.arange(4))
    with pytest.raises(ValueError, match="images: expected images of class 1 that `prepare` has seen, got 3 others"):
        attack.poison(images, labels)
    with pytest.raises(ValueError, match="data: expected images of the target class, got none of class 9"):
        LabelConsistent(target=9).prepare(trained, data)
    with pytest.raises(ValueError, match="data: expected images of at least 6x6 pixels"):
        LabelConsistent().prepare(network(), shapes(20, size=(5, 8)))


def test_equal_images_are_no_trouble(trained, data, small):
    twice = ImageTensors(data.images[:40].repeat(2, 1, 1, 1), data.labels[:40].repeat(2))
    attack = small["label_consistent"].prepared(trained, twice)
    assert len(attack.state["keys"]) == 10
    assert len(bdfast.poisoned(twice, attack).poison_indices) == 12


def test_inputs_that_are_no_images_are_refused():
    rows = torch.utils.data.TensorDataset(torch.rand(8, 4), torch.arange(8) % 2)
    with pytest.raises(ValueError, match=r"data: expected batches of \(images \[B, C, H, W\], labels\), got list"):
        LowFrequency().prepare(nn.Linear(4, 2), rows)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowFrequency(amplitude=0.0), r"amplitude: expected a number in \(0, 1\], got 0.0"),
        (lambda: LowFrequency(smoothness=0.0), "smoothness: expected more than 0, got 0.0"),
        (lambda: LabelConsistent(clean_label=False), "clean_label: expected True, got False"),
        (lambda: LabelConsistent(eps=2.0), r"eps: expected a number in \(0, 1\], got 2.0"),
        (lambda: LabelConsistent(steps=0), "steps: expected at least 1, got 0"),
        (lambda: TrojanNN(area=0.0), r"area: expected a fraction in \(0, 1\], got 0.0"),
        (lambda: TrojanNN(neurons=0), "neurons: expected at least 1, got 0"),
        (lambda: InputAware(mask_density=1.0), r"mask_density: expected a fraction in \(0, 1\), got 1.0"),
        (lambda: InputAware(width=6), "width: expected a multiple of 4, got 6"),
        (lambda: InputAware(cross_rate=-1.0), "cross_rate: expected 0 or more, got -1.0"),
        (lambda: InputAware(steps=0), "steps: expected more than 0, got 0"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
