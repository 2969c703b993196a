import copy

import pytest
import torch
import torchvision
from torch import nn

from bdfast.models.preact_resnet import PreActResNet18
from bdfast.neurons.index import NeuronIndex


@pytest.fixture
def model():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 3)
        self.mixer = nn.Linear(3, 3)
        self.again = self.mixer
        self.head = nn.Linear(3, 7)
        self.head.weight = self.tokens.weight


def names(index):
    return [layer.parameter for layer in index.layers]


def test_layers_are_numbered_in_module_order(model):
    index = NeuronIndex(model)
    assert [(layer.parameter, layer.module, layer.kind, layer.start, layer.stop) for layer in index.layers] == [
        ("0.weight", "0", "conv", 0, 4),
        ("2.weight", "2", "conv", 4, 10),
        ("4.weight", "4", "linear", 10, 15),
    ]
    assert len(index) == 15
    assert repr(index) == "NeuronIndex(15 neurons in 3 parameters)"


def test_locate_is_the_inverse_of_the_flat_number(model):
    index = NeuronIndex(model)
    found = [(layer.parameter, row) for layer, row in map(index.locate, range(len(index)))]
    assert found == [(layer.parameter, row) for layer in index.layers for row in range(len(layer))]


def test_rows_share_memory_and_can_be_written_without_autograd(model):
    rows = NeuronIndex(model).rows(model)
    assert [tuple(view.shape) for view in rows] == [(4, 3, 3, 3), (3, 2, 2, 2), (3, 2, 2, 2), (5, 6)]
    rows[2][1] = 9
    assert (model[2].weight[2:, 1] == 9).all()
    assert (model[2].weight == 9).sum() == 8


def test_rows_of_another_model_and_of_a_state_dict(model):
    index, other = NeuronIndex(model), copy.deepcopy(model)
    with torch.no_grad():
        other[4].weight.add_(1)
    for source in (other, other.state_dict()):
        assert torch.equal(index.rows(source)[-1], model[4].weight + 1)


def test_kinds_include_and_exclude_select(model):
    assert names(NeuronIndex(model, kinds="linear")) == ["4.weight"]
    assert names(NeuronIndex(model, kinds=("norm", "linear"))) == ["1.weight", "4.weight"]
    residual = Residual()
    assert names(NeuronIndex(residual, exclude="*shortcut*")) == ["conv.weight", "fc.weight"]
    assert names(NeuronIndex(residual, exclude=("shortcut.*", "fc"))) == ["conv.weight"]
    assert names(NeuronIndex(residual, include=("fc", "shortcut.0.weight"))) == [
        "shortcut.0.weight",
        "fc.weight",
    ]
    selected = NeuronIndex(residual, include="fc")
    assert (len(selected), selected.layers[0].start) == (2, 0)


def test_frozen_parameters_are_neurons(model):
    assert len(NeuronIndex(model.requires_grad_(False))) == 15


def test_a_shared_parameter_is_counted_once_under_its_first_name():
    model = Tied()
    assert names(NeuronIndex(model)) == ["tokens.weight", "mixer.weight"]
    assert names(NeuronIndex(model, kinds="linear")) == ["mixer.weight"]
    assert names(NeuronIndex(model, exclude="tokens")) == ["mixer.weight"]


def test_a_model_that_unties_is_still_readable():
    model, untied = Tied(), Tied()
    untied.head.weight = nn.Parameter(torch.zeros(7, 3))
    assert torch.equal(NeuronIndex(model).rows(untied)[0], untied.tokens.weight)


def test_empty_parameters_are_left_out():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2))
    assert names(NeuronIndex(model)) == ["1.weight"]


def preact_of_the_papers():
    return PreActResNet18(10)


@pytest.mark.parametrize("build", [preact_of_the_papers, torchvision.models.resnet18])
def test_resnet18_in_scope_has_3904_neurons(build):
    model = build()
    for scope in ("auto", "conv"):
        index = NeuronIndex.in_scope(model, scope)
        assert (len(index), len(index.layers)) == (3904, 17)
        assert sum(view.numel() for view in index.rows(model)) == 10_987_200 + 3 * 64 * (
            model.conv1.weight[0, 0].numel() - 9
        )
    # Three shortcut convolutions of 128 + 256 + 512 channels, and the classifier.
    assert len(NeuronIndex(model)) == 3904 + 896 + len(list(model.children())[-1].weight)


def test_vit_b_16_in_scope_has_all_of_its_layers():
    model = torchvision.models.vit_b_16(image_size=32)
    index = NeuronIndex.in_scope(model)
    assert len(index) == 768 + 12 * (3 * 768 + 768 + 3072 + 768) + 1000
    assert sum(len(layer) for layer in index.layers if layer.kind == "attention") == 12 * 3 * 768
    assert names(NeuronIndex.in_scope(model, "conv")) == ["conv_proj.weight"]
    assert len(NeuronIndex(model, kinds="norm")) == 25 * 768


def test_auto_scope_counts_layers_not_weights():
    # Like VGG, whose classifier has six times the weights of its convolutions.
    vgg = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(500, 100), nn.Linear(100, 10))
    assert {layer.kind for layer in NeuronIndex.in_scope(vgg).layers} == {"conv"}
    mixer = nn.Sequential(nn.Conv2d(3, 64, 7), nn.Linear(2, 2), nn.Linear(2, 2))
    assert {layer.kind for layer in NeuronIndex.in_scope(mixer).layers} == {"conv", "linear"}
    assert len(NeuronIndex.in_scope(nn.Linear(2, 3))) == 3


def test_scope_can_be_any_kind(model):
    assert names(NeuronIndex.in_scope(model, "norm")) == ["1.weight"]
    assert names(NeuronIndex.in_scope(Residual(), "conv")) == ["conv.weight"]
    with pytest.raises(ValueError, match=r"scope: expected one of auto, .*conv.*, got 'all';"):
        NeuronIndex.in_scope(model, "all")


def test_no_neurons_is_an_error(model):
    with pytest.raises(ValueError, match=r"model: expected at least one neuron of .*, got none in a Sequential; widen"):
        NeuronIndex(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))
    with pytest.raises(ValueError, match=r"exclude=\('\*',\)"):
        NeuronIndex(model, exclude="*")
    with pytest.raises(ValueError, match="expected at least one neuron"):
        NeuronIndex.in_scope(nn.BatchNorm2d(3))


def test_a_wrong_source_is_named_with_what_to_do(model):
    index = NeuronIndex(model)
    with pytest.raises(
        ValueError, match=r"source\['0.weight'\]: expected .*\(4, 3, 3, 3\).*, got none; .*torch.compile"
    ):
        index.rows({})
    with pytest.raises(ValueError, match=r"source\['0.weight'\]: expected a tensor .*, got a list;"):
        index.rows({"0.weight": [1.0]})
    wider = copy.deepcopy(model)
    wider[4] = nn.Linear(6, 9)
    with pytest.raises(ValueError, match=r"source\['4.weight'\]: expected shape \(5, 6\) .*, got \(9, 6\); pass"):
        index.rows(wider)
    with pytest.raises(TypeError, match=r"source: expected .*, got a list;"):
        index.rows([model])
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, .*, got a OrderedDict;"):
        NeuronIndex(model.state_dict())


def test_mixed_dtypes_and_meta_tensors_are_refused(model):
    index = NeuronIndex(model)
    model[4].bfloat16()
    with pytest.raises(
        ValueError,
        match=r"source\['4.weight'\]: expected torch.float32 .* like source\['0..*, got torch.bfloat16 on cpu;",
    ):
        index.rows(model)
    # Normalisation layers in float32 inside a bfloat16 model are usual, and do not count.
    model.bfloat16()[1].float()
    assert index.rows(model)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"source\['0.weight'\]: expected .*, got one on the meta device; load"):
        index.rows(model.to("meta"))
    with pytest.raises(ValueError, match=r"model\['0.weight'\]: expected .*, got one on the meta device"):
        NeuronIndex(model)
