"""What all attacks that make their trigger with a network have in common."""

import copy
from dataclasses import replace

import pytest
import torch

import bdfast
from bdfast.attacks import METHODS, PreparedAttack
from bdfast.attacks.trigger_files import read_trigger, save_trigger, trigger_path
from bdfast.data.images import to_uint8

NAMES = [name for name, attack in METHODS.items() if issubclass(attack, PreparedAttack)]
EACH = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def quick(small, name) -> PreparedAttack:
    """The attack with so few steps that its trigger is a bad one."""
    return replace(small[name], steps=2, **({"mask_steps": 2} if name == "input_aware" else {}))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_a_trigger_keeps_shape_dtype_and_range(prepared, name, dtype, leading):
    images = torch.rand(*leading, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = images.clone()
    triggered = prepared[name](images)
    assert triggered.shape == images.shape
    assert triggered.dtype == dtype
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    assert torch.equal(images, before)
    changed = (triggered != images).flatten(max(0, len(leading))).any(-1)
    assert changed.all()


@EACH
def test_colour_and_odd_sizes(quick, network, shapes, name):
    colour = shapes(40, size=(13, 17), channels=3)
    attack = quick.prepared(network(channels=3), colour)
    triggered = attack(colour.batch(torch.arange(5))[0])
    assert triggered.shape == (5, 3, 13, 17)
    assert bool(((triggered >= 0) & (triggered <= 1)).all())
    with pytest.raises(ValueError, match=r"images: expected \[..., 3, (13, 17|any, any)\], the shape that"):
        attack(torch.zeros(1, 13, 17))


@EACH
def test_the_seed_decides(trained, data, quick, name):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (quick.prepare(trained, data, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[part], again[part]) for part in first)
    if name != "label_consistent":  # draws nothing
        assert any(not torch.equal(first[part], other[part]) for part in first)


@EACH
def test_without_a_trigger_every_use_says_so(data, small, name):
    attack = small[name]
    images, labels = data.batch(torch.arange(4))
    missing = pytest.raises(ValueError, match=f"attack: expected a {type(attack).__name__} with its trigger, got one")
    with missing:
        attack(images)
    with missing:
        attack.poison(images, labels)
    with missing:
        bdfast.poisoned(data, attack)
    with missing:
        bdfast.Triggered(data, attack)[0]
    with missing:
        attack.known_state()
    # Who would be poisoned is known without it.
    assert attack.victims(labels).tolist() == [(label == 1) == attack.clean_label for label in labels.tolist()]
    assert len(bdfast.Triggered(data, attack)) == 120


@EACH
def test_a_trigger_comes_back_from_its_file(prepared, small, shapes, tmp_path, name):
    attack = prepared[name]
    path = trigger_path(tmp_path / "net.safetensors")
    assert path.name == "net.trigger.safetensors"
    save_trigger(attack, path)
    again = read_trigger(small[name], path)
    images = shapes(6, seed=1).batch(torch.arange(6))[0]
    assert torch.equal(again(images), attack(images))
    assert again.state.keys() == attack.state.keys()
    other = next(attack for attack in small.values() if type(attack) is not type(again))
    with pytest.raises(ValueError, match=f"trigger: expected the trigger of {type(other).__name__} in .* got that of"):
        read_trigger(other, path)
    with pytest.raises(ValueError, match=r"trigger: expected the trigger of .* got no such file"):
        read_trigger(attack, tmp_path / "nowhere.safetensors")


@EACH
def test_one_image_and_a_batch_get_the_same_8_bit_trigger(prepared, data, name):
    images, labels = data.batch(torch.arange(40))
    attack = prepared[name]
    one_by_one = torch.stack([to_uint8(attack(image)) for image in images])
    assert torch.equal(to_uint8(attack(images)), one_by_one)
    mine = attack.victims(labels)
    one_by_one = torch.cat(
        [to_uint8(attack.poison(x[None], y[None])) for x, y in zip(images, labels, strict=True) if attack.victims(y)]
    )
    assert torch.equal(to_uint8(attack.poison(images[mine], labels[mine])), one_by_one)


@EACH
def test_poisoned_view_and_tensors_are_the_same_data(items, prepared, data, name):
    attack = prepared[name]
    fast, slow = bdfast.poisoned(data, attack, seed=3), bdfast.poisoned(items(data), attack, seed=3)
    count = round(attack.poison_rate * len(data))
    crossed = count // 2 if name == "input_aware" else 0
    for view in (fast, slow):
        assert len(view.poison_indices) == count
        assert len(view.cross_indices) == crossed
    assert torch.equal(fast.poison_indices, slow.poison_indices)
    assert torch.equal(fast.cross_indices, slow.cross_indices)
    for index in range(len(data)):
        (image, label), (same_image, same_label) = fast[index], slow[index]
        assert torch.equal(image, same_image)
        assert label == same_label
    changed = (fast.images != data.images).flatten(1).any(1).nonzero().squeeze(1)
    assert torch.equal(changed, torch.cat([fast.poison_indices, fast.cross_indices]).sort().values)
    expected = data.labels.clone()
    expected[fast.poison_indices] = attack.relabel(expected[fast.poison_indices])
    assert torch.equal(fast.labels, expected)
    assert torch.equal(fast.labels[fast.cross_indices], data.labels[fast.cross_indices])


@EACH
@torch.no_grad()
def test_the_network_is_left_as_it_was(trained, data, quick, name):
    model = copy.deepcopy(trained).train()
    model[0].weight.requires_grad_(False)
    model[3].bias.grad = torch.ones_like(model[3].bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(x.requires_grad, x.grad) for x in model.parameters()]
    quick.prepare(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(x.requires_grad, x.grad) for x in model.parameters()] == flags
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@EACH
def test_options_are_listed_without_the_trigger(name):
    (listed,) = [method for method in bdfast.list_methods("poison") if method.name == name]
    assert "state" not in listed.options
    assert listed.options["target"] == 0
    assert listed.summary
