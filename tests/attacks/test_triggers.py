"""What every attack of METHODS keeps to that needs no network."""

import dataclasses
import json
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.data import TensorDataset

from bdfast.attacks import METHODS, SIG, Bpp, PreparedAttack, Triggered, WaNet, all_to_all, poisoned
from bdfast.data import ImageTensors

# Those that need a network are in test_prepared_attacks.py.
NAMES = [name for name, attack in METHODS.items() if not issubclass(attack, PreparedAttack)]
PROFILE = settings(
    deadline=None, derandomize=True, database=None, max_examples=20, suppress_health_check=list(HealthCheck)
)
SIDES = st.sampled_from([28, 29, 32, 45, 64, 224])
SHAPES = st.tuples(st.sampled_from([1, 3]), SIDES, SIDES)
every_attack = pytest.mark.parametrize("name", NAMES)


def photos(count: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random images [N, C, H, W] uint8 of smooth areas with a little noise, some black and white pixels included."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, shape[0], 5, 5, generator=generator)
    smooth = functional.interpolate(coarse, shape[1:], mode="bilinear") * 1.02 - 0.01
    noise = torch.randn(count, *shape, generator=generator) * 0.02
    return smooth.add(noise).clamp(0, 1).mul(255).round().to(torch.uint8)


@every_attack
@PROFILE
@given(shape=SHAPES, count=st.integers(0, 3), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_a_trigger_maps_images_to_images(name, shape, count, dtype):
    images = photos(count, shape).to(dtype) / 255
    given_images, state = images.clone(), torch.get_rng_state()
    triggered = METHODS[name]()(images)
    assert triggered.shape == images.shape
    assert triggered.dtype == dtype
    assert ((triggered >= 0) & (triggered <= 1)).all()
    assert torch.equal(images, given_images)
    assert torch.equal(torch.get_rng_state(), state)
    again = METHODS[name]()
    assert torch.equal(again(images), triggered)
    assert torch.equal(again(images.contiguous(memory_format=torch.channels_last)), triggered)
    assert torch.equal(again(images[:, None])[:, 0], triggered)
    for image, expected in zip(images, triggered, strict=True):
        assert torch.equal(again(image), expected)


@every_attack
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_black_and_white_images_stay_in_range(name, level):
    triggered = METHODS[name]()(torch.full((3, 224, 224), level))
    assert 0 <= triggered.min() <= triggered.max() <= 1


@every_attack
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 224, 224)])
def test_a_trigger_can_be_seen_after_rounding_to_8_bits(name, shape):
    images = photos(40, shape)
    triggered = METHODS[name]()(images / 255).mul(255).round().to(torch.uint8)
    assert (triggered != images).flatten(1).any(1).float().mean() > 0.95


@every_attack
def test_everything_moves_to_the_device_of_the_images(name):
    """On "meta" as on a GPU, an operation with a tensor of the CPU is an error."""
    images = torch.zeros(2, 3, 32, 32, device="meta")
    attack = METHODS[name]()
    assert attack(images).device == images.device
    assert attack.poison(images, torch.zeros(2, device="meta")).device == images.device
    if attack.cross_count(100):
        assert attack.cross(images[0], images[1], torch.Generator()).device == images.device


MODES = {
    "changed labels": {"clean_label": False, "target": 2},
    "all to all": {"clean_label": False, "targets": all_to_all(4)},
    "clean label": {"clean_label": True, "target": 3},
}


@every_attack
@PROFILE
@given(shape=SHAPES.filter(lambda shape: max(shape) < 224), mode=st.sampled_from(list(MODES)), seed=st.integers(0, 9))
def test_poisoned_views_and_tensors_are_the_same_data(items, name, shape, mode, seed):
    count = 24
    data = ImageTensors(photos(count, shape, seed), torch.arange(count) % 4)
    attack = METHODS[name](poison_rate=0.125, **MODES[mode])
    fast, slow = poisoned(data, attack, seed=seed), poisoned(items(data), attack, seed=seed)
    poison, cross = fast.poison_indices.tolist(), fast.cross_indices.tolist()
    assert slow.poison_indices.tolist() == poison
    assert slow.cross_indices.tolist() == cross
    assert len(set(poison)) == 3
    assert len(set(cross)) == min(attack.cross_count(3), count - 3)
    assert not set(poison) & set(cross)
    for index in range(count):
        (image, label), (clean, true) = slow[index], data[index]
        assert torch.equal(image, fast[index][0])
        assert label == fast[index][1]
        if index not in poison + cross:
            assert torch.equal(image, clean)
        if index in poison and mode != "clean label":
            assert label == ((true + 1) % 4 if mode == "all to all" else 2) != true
        else:
            assert label == true
            assert index not in poison or true == 3
    other = poisoned(data, attack, seed=seed + 1)
    assert other.poison_indices.tolist() != poison or not torch.equal(other.images, fast.images)
    test = Triggered(data, attack)
    assert len(test) == (24 if mode == "all to all" else 18)
    assert all(target != true for _, target, true in test)


@every_attack
def test_the_default_poison_rate_is_reached_with_ten_balanced_classes(name):
    data = ImageTensors(photos(100, (1, 28, 28)), torch.arange(100) % 10)
    attack = METHODS[name]()
    assert len(poisoned(data, attack).poison_indices) == round(100 * attack.poison_rate)


def test_a_view_of_many_large_images_is_small():
    """It holds labels and indices, not images."""
    images = torch.zeros(1).expand(100_000, 3, 224, 224)
    data = TensorDataset(images, torch.arange(100_000) % 10)
    for attack in (WaNet(), Bpp(), SIG()):
        tracemalloc.start()
        view = poisoned(data, attack)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        held = sum(x.untyped_storage().nbytes() for x in vars(view).values() if isinstance(x, torch.Tensor))
        assert len(view.poison_indices) + len(view.cross_indices) >= 5_000
        print(f"{type(attack).__name__}: {(peak + held) / 1e6:.1f} MB")  # noqa: T201, for pytest -s
        assert peak + held < 50e6


@every_attack
def test_options_can_be_stored_as_json(name):
    options = dataclasses.asdict(METHODS[name]())
    assert json.loads(json.dumps(options)).keys() == options.keys()
