"""Descriptions of networks: by name, from strangers, of timm and of the user."""

import json
import sys
import types

import pytest
import torch
from torch import nn

from bdfast.models import ARCHITECTURES, ModelSpec, SmallViT, register_model

EARLIER = {"num_classes": 3, "in_channels": 3, "width": 64, "stem": "cifar", "mean": [], "std": [], "class_names": []}


@pytest.fixture
def timm(monkeypatch):
    """Stands in for timm: two names, and a constructor that keeps what it was given."""
    module = types.ModuleType("timm")
    module.calls = []
    module.list_models = lambda: ["resnet18", "vit_tiny_patch16_224"]
    module.create_model = lambda name, **options: module.calls.append((name, options)) or nn.Flatten()
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


@pytest.fixture
def registered(monkeypatch):
    for name, builder in ARCHITECTURES.copy().items():
        monkeypatch.setitem(ARCHITECTURES, name, builder)  # restores the dictionary at the end
    yield register_model
    ARCHITECTURES.pop("mine", None)


def test_left_out_sizes_are_the_published_ones():
    with torch.device("meta"):
        first = {
            name: next(iter(ModelSpec(name).build().parameters())).shape[-1 if name == "small_vit" else 0]
            for name in ARCHITECTURES
        }
        assert len(ModelSpec("small_vit").build().blocks) == 12
        assert len(ModelSpec("small_vit", depth=2).build().blocks) == 2
        assert [len(stage) for stage in ModelSpec("small_convnext", depth=2).build().features[1::2]] == [2, 2, 6, 2]
    assert first == {
        "preact_resnet18": 64,
        "small_vgg11": 64,
        "small_vgg11_bn": 64,
        "small_vgg16": 64,
        "small_vgg16_bn": 64,
        "small_mobilenet_v2": 32,
        "small_vit": 192,
        "small_convnext": 96,
    }


def test_descriptions_of_earlier_versions():
    spec = ModelSpec.from_json(json.dumps({"arch": "preact_resnet18", **EARLIER}))
    assert spec == ModelSpec(num_classes=3, width=64)
    # They gave a width for torchvision's networks, too.
    spec = ModelSpec.from_json(json.dumps({"arch": "squeezenet1_1", **EARLIER}))
    assert spec == ModelSpec("squeezenet1_1", num_classes=3)
    spec.build()


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 1001},
        {"depth": 0},
        {"depth": 2.0},
        {"depth": "2"},
        {"width": "64"},
        {"width": 1_000_000},
        {"image_size": 0},
        {"image_size": None},
        {"image_size": [28, 28]},
        {"num_classes": None},
        {"heads": 4},
        {"arch": ["small_vit"]},
        {"arch": None},
    ],
)
def test_hostile_sizes_are_refused(change):
    with pytest.raises(ValueError, match="model description"):
        ModelSpec.from_json(json.dumps({"arch": "small_vit", **EARLIER, **change}))


@pytest.mark.parametrize("arch", ["small_vgg16", "small_mobilenet_v2", "small_vit", "small_convnext"])
def test_the_largest_description_takes_no_memory_on_meta(arch):
    values = {"arch": arch, **EARLIER, "width": 999_936, "num_classes": 999_999, "image_size": 999_936}
    with torch.device("meta"):
        model = ModelSpec.from_json(json.dumps(values)).build()
    assert sum(parameter.numel() for parameter in model.parameters()) > 10**12


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec("resnet18", in_channels=1), "in_channels: expected 3 for resnet18, .* got 1; repeat a grey channel"),
        (ModelSpec("resnet18", width=16), "width: expected none for resnet18, .* got 16; leave it out"),
        (ModelSpec("resnet18", stem="stride2"), "stem: expected none for resnet18, .* got 'stride2'; leave it out"),
        (ModelSpec("small_vgg16", depth=16), "depth: expected none for small_vgg16, .* got 16; leave it out"),
        (ModelSpec("small_vit", stem="imagenet"), "stem: expected none for small_vit"),
        (ModelSpec("preact_resnet18", depth=18), "depth: expected none for preact_resnet18"),
        (ModelSpec("small_vitt"), "arch: expected one of preact_resnet18, .* did you mean 'small_vit'"),
    ],
)
def test_what_an_architecture_would_ignore_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        spec.build()


def test_timm_gets_channels_and_classes_and_downloads_nothing(timm):
    spec = ModelSpec("timm/resnet18", num_classes=7, in_channels=1, mean=(0.5,), std=(0.5,))
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert isinstance(spec.build().network, nn.Flatten)
    assert timm.calls == [("resnet18", {"pretrained": False, "in_chans": 1, "num_classes": 7})]
    with pytest.raises(ValueError, match="width: expected none for timm/resnet18"):
        ModelSpec("timm/resnet18", width=8).build()


@pytest.mark.parametrize("name", ["hf-hub:somebody/weights", "local-dir:/tmp", "resnet18.a1_in1k", "resnet-18", ""])
def test_names_that_timm_would_fetch_are_refused(timm, name):
    with pytest.raises(ValueError, match=r"arch: expected timm/ and a name from timm\.list_models"):
        ModelSpec(f"timm/{name}").build()
    assert timm.calls == []


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"arch: expected timm to be installed .* `pip install timm`\."):
        ModelSpec("timm/resnet18").build()


def test_vit_is_the_one_of_timm():
    timm = pytest.importorskip("timm")
    network = ModelSpec("timm/vit_tiny_patch16_224", num_classes=5, in_channels=1).build().eval()
    assert isinstance(network, timm.models.VisionTransformer)
    own = SmallViT(5, image_size=224, in_channels=1).eval()
    own.load_state_dict(network.state_dict())
    images = torch.rand(1, 1, 224, 224)
    torch.testing.assert_close(own(images), network(images))


def test_a_network_of_the_user(registered):
    registered("mine", lambda spec: nn.Sequential(nn.Flatten(), nn.Linear(spec.in_channels, spec.num_classes)))
    spec = ModelSpec("mine", num_classes=4, in_channels=2, width=3, depth=2, mean=(0.5, 0.5), std=(1.0, 1.0))
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert spec.build()(torch.zeros(1, 2, 1, 1)).shape == (1, 4)
    registered("mine", lambda spec: nn.Flatten())  # a cell of a notebook that is run again
    assert isinstance(ModelSpec("mine").build(), nn.Flatten)


@pytest.mark.parametrize("name", ["Mine", "timm/mine", "", 3, "small_vit", "resnet18"])
def test_names_that_are_not_free_are_refused(registered, name):
    before = ARCHITECTURES.copy()
    with pytest.raises(ValueError, match="name: expected"):
        registered(name, nn.Flatten)
    with pytest.raises(TypeError, match="builder: expected a function of a ModelSpec, got 3"):
        registered("mine", 3)
    assert before == ARCHITECTURES
