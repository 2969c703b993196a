"""Scaling of skips, against networks that are written out by hand."""

import copy
import gc
import io
import json
import threading
import weakref

import pytest
import torch
import torchvision
from networks_with_skips import Of, branch, built, convolutions, images, of_preact, of_torchvision, of_vit, skips_of
from torch import nn
from torch.nn import functional as F

from bdfast.defenses.parts.scaled_skips import scaled_sums, set_scaled_sums, suppress_skip, suppressed
from bdfast.defenses.parts.skips import Skip
from bdfast.models import PreActResNet18, SmallViT
from bdfast.training.copies import copy_of
from bdfast.training.seeds import seeded

BY_HAND = [
    pytest.param(lambda: PreActResNet18(5, width=4), of_preact, 8, id="preact"),
    pytest.param(lambda: torchvision.models.resnet18(num_classes=5), of_torchvision, 8, id="torchvision"),
    pytest.param(lambda: SmallViT(5, image_size=16, width=8, depth=3), of_vit, 6, id="vit"),
]


@pytest.mark.parametrize(("make", "by_hand", "count"), BY_HAND)
@pytest.mark.parametrize("gamma", [0.0, 0.3])
@torch.no_grad()
def test_a_suppressed_network_is_that_written_by_hand(make, by_hand, count, gamma):
    model, x = built(make), images()
    skips, plain = skips_of(model, x), model(x)
    torch.testing.assert_close(plain, by_hand(model, x, -1, gamma), rtol=0, atol=1e-10)
    assert len(skips) == count
    for number, skip in enumerate(skips):
        expected = by_hand(model, x, number, gamma)
        assert float((expected - plain).abs().max()) > 1e-6
        with suppressed(model, skip, gamma):
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
        if number in (1, 2):  # in resnets an identity and a projection
            assert torch.equal(model(x), plain)
            lasting = copy.deepcopy(model)
            suppress_skip(lasting, skip, gamma)
            torch.testing.assert_close(lasting(x), expected, rtol=0, atol=1e-10)
            assert list(lasting.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(("make", "by_hand", "count"), BY_HAND)
def test_gradients_of_a_suppressed_network(make, by_hand, count):
    """In training mode, in which BatchNorm makes a sum of its own: it counts batches."""
    model, x = built(make).train(), images(32 if count == 8 else 16)
    skip = skips_of(copy.deepcopy(model), x)[1]
    expected = torch.autograd.grad(
        by_hand(copied := copy.deepcopy(model), x, 1, 0.3).square().sum(), copied.parameters()
    )
    with suppressed(model, skip, 0.3):
        found = torch.autograd.grad(model(x).square().sum(), model.parameters())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_a_projection_is_suppressed_by_its_weights_alone():
    model, x = built(lambda: torchvision.models.resnet18(num_classes=5)), images()
    skip = skips_of(model, x)[2]
    before = copy.deepcopy(model.state_dict())
    suppress_skip(model, skip, 0.0)
    assert scaled_sums(model) == {}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(skip.parameters)


def test_transformer_layers_of_torch():
    """In eval mode without gradients they would run in one call, in which no sum is seen."""
    with seeded(0, torch.device("cpu")):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x = images()[:, 0, :, :8]
    skips = skips_of(model, x)
    assert [(skip.module, skip.addition) for skip in skips] == [(f"layers.{i}", j) for i in range(2) for j in range(2)]
    suppress_skip(model, skips[1], 0.0)
    first, second = model.layers
    with torch.no_grad():
        y = first.norm1(x + first.self_attn(x, x, x)[0])
        y = first.norm2(first.linear2(F.relu(first.linear1(y))))
        torch.testing.assert_close(model(x), second(y), rtol=0, atol=1e-10)


def test_copies_pickles_and_state_dicts():
    model, x = built(lambda: SmallViT(5, image_size=16, width=8, depth=2)), images()
    names = list(model.state_dict())
    fresh = copy.deepcopy(model)
    skips = skips_of(model, x)
    for skip in skips[2:]:
        suppress_skip(model, skip, 0.5)
    expected = model(x)
    assert list(model.state_dict()) == names
    assert isinstance(model.blocks[1], type(fresh.blocks[1]))
    assert "Suppressed" in repr(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    told = json.loads(json.dumps(scaled_sums(model)))
    fresh.load_state_dict(model.state_dict())
    assert not torch.allclose(fresh(x), expected)
    set_scaled_sums(fresh, told)
    for other in (loaded, copy.deepcopy(model), copy_of(model), fresh):
        assert torch.equal(other(x), expected)
        assert scaled_sums(other) == scaled_sums(model)
        assert type(other.blocks[1]) is type(model.blocks[1])
        set_scaled_sums(other, {})
        assert type(other.blocks[1]).__name__ == "TransformerBlock"
        assert not torch.allclose(other(x), expected)
    assert torch.equal(model(x), expected)
    # A network that is suppressed already is traced as any other.
    assert [(skip.module, skip.addition) for skip in skips_of(model, x)] == [(s.module, s.addition) for s in skips]


def test_two_skips_of_a_block_are_scaled_in_any_order():
    model, x = built(lambda: SmallViT(5, image_size=16, width=8, depth=1)), images()
    first, second = skips_of(model, x)
    with suppressed(model, second, 0.5), suppressed(model, first, 0.0), suppressed(model, first, 0.5):
        y = torch.cat([model.cls_token.expand(len(x), -1, -1), model.patch_embed(x)], 1) + model.pos_embed
        block = model.blocks[0]
        y = block.attn(block.norm1(y))
        y = block.mlp(block.norm2(y)) + 0.5 * y
        torch.testing.assert_close(model(x), model.head(model.norm(y)[:, 0]), rtol=0, atol=1e-10)
    assert scaled_sums(model) == {}


def test_threads_do_not_meet():
    """Two threads run a suppressed network, each another one, and a third thread the same blocks as they were."""
    model, x = built(lambda: PreActResNet18(5, width=4)), images()
    skips = skips_of(model, x)
    networks = [copy.deepcopy(model) for _ in range(3)]
    suppress_skip(networks[0], skips[1], 0.0)
    suppress_skip(networks[1], skips[1], 0.5)
    networks.append(networks[0])
    expected = [network(x) for network in networks]
    assert not torch.allclose(expected[0], expected[1])
    barrier, same = threading.Barrier(len(networks)), [0] * len(networks)

    def work(place):
        barrier.wait()
        for _ in range(20):
            same[place] += torch.equal(networks[place](x), expected[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(networks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [20] * len(networks)


def test_an_exception_inside_leaves_no_mode_behind():
    model, x = built(lambda: PreActResNet18(5, width=4)), images()
    suppress_skip(model, skips_of(model, x)[0], 0.0)
    expected = model(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="running_mean"):
            model.layer1[0](torch.cat([model.conv1(x)] * 2, 1))
        assert torch._C._len_torch_function_stack() == 0
    assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match="mat1"):
        skips_of(nn.Sequential(model, nn.Linear(1, 1).double()), x)
    assert torch._C._len_torch_function_stack() == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sums_that_differ_from_pass_to_pass_are_refused():
    model = Of(
        lambda model, x: x + branch(model, x, 0) + (torch.rand_like(x) if model.training else 0), *convolutions(1)
    )
    x = images().float()
    suppress_skip(model.eval(), skips_of(model, x)[0], 0.0)
    model(x)
    with pytest.raises(RuntimeError, match=r"^model: expected 1 sum\(s\) .* of a Of, .*, got 2; use a network"):
        model.train()(x)


def test_names_that_the_network_does_not_have_are_refused():
    model = built(lambda: PreActResNet18(5, width=4))
    with pytest.raises(
        ValueError, match=r"^sums: expected names of modules of the network, a PreActResNet18, got 'a'; "
    ):
        set_scaled_sums(model, {"layer1.0": [(0, 1, 1, 0.0)], "a": [(0, 1, 1, 0.0)]})
    assert scaled_sums(model) == {}


@pytest.mark.parametrize("channels_last", [False, True])
def test_autocast_and_channels_last(channels_last):
    model, x = built(lambda: PreActResNet18(5, width=4)).float(), images().float()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        skips = skips_of(model, x)
        assert skips == skips_of(copy.deepcopy(model).float(), x)
        suppress_skip(model, skips[1], 0.0)
        assert model(x).dtype == torch.bfloat16
        torch.testing.assert_close(model(x), of_preact(model, x, 1, 0.0), rtol=0.05, atol=0.05)
    assert len(skips) == 8


def test_nothing_is_kept_alive():
    dead = []

    def watched(model, x):
        hidden = model.layers[0](x)
        kept = weakref.ref(hidden)
        y = torch.tanh(hidden)
        del hidden
        dead.append(kept() is None)
        return x + y

    model = Of(watched, *convolutions(1))
    gc.disable()
    try:
        (skip,) = skips_of(model, images().float())
        with torch.no_grad(), suppressed(model, skip, 0.0):
            model(images().float())
    finally:
        gc.enable()
    assert dead == [True, True]


def test_a_block_that_runs_twice_is_suppressed_where_it_is_meant():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return x + self.conv(x)

    block = Block()
    model = nn.Sequential(nn.Sequential(block, block), nn.Flatten()).double()
    x = images()
    skips = skips_of(model, x)
    assert skips == [Skip("0", 0, 2, 0), Skip("0", 1, 2, 0)]
    suppress_skip(model, skips[1], 0.5)
    first = x + block.conv(x)
    torch.testing.assert_close(model(x), (0.5 * first + block.conv(first)).flatten(1), rtol=0, atol=1e-12)


def in_place(model, x):
    x = x * 1
    x += branch(model, x, 0)
    return x


def in_place_by_name(model, x):
    x = x * 1
    x.add_(branch(model, x, 0))
    return x


def with_names(model, x):
    return torch.add(other=x, input=branch(model, x, 0), alpha=1)


WAYS = {
    "+": (lambda model, x: x + branch(model, x, 0), 0),
    "+=, into the skip": (in_place, 0),
    "add_, into the skip": (in_place_by_name, 0),
    "+=, into the branch": (lambda model, x: branch(model, x, 0).mul(1).add_(x), 1),
    "torch.add": (lambda model, x: torch.add(branch(model, x, 0), x), 1),
    "names": (with_names, 0),
    "Tensor.add": (lambda model, x: x.add(other=branch(model, x, 0)), 0),
    "sum": (lambda model, x: sum([branch(model, x, 0), x]), 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_to_add(way):
    function, operand = WAYS[way]
    model, x = Of(function, *convolutions(1)).double(), images()
    (skip,) = skips_of(model, x)
    assert skip == Skip("", 0, 1, operand)
    suppress_skip(model, skip, 0.25)
    given = x.clone()
    torch.testing.assert_close(model(x), branch(model, x, 0) + 0.25 * x, rtol=0, atol=1e-12)
    assert torch.equal(x, given)
