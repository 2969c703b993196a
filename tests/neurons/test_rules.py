import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from bdfast.neurons import rules
from bdfast.neurons.index import NeuronIndex
from bdfast.neurons.reinitialization import prune_neurons
from bdfast.neurons.rules import register_neurons

CONVOLUTIONS = [
    pytest.param(module, id=f"{type(module).__name__}-groups{module.groups}")
    for rank in (1, 2, 3)
    for kind in ("Conv", "ConvTranspose")
    for module in (
        getattr(nn, f"{kind}{rank}d")(4, 6, 2),
        getattr(nn, f"{kind}{rank}d")(4, 6, 2, groups=2),
        getattr(nn, f"{kind}{rank}d")(4, 4, 2, groups=4),
        getattr(nn, f"{kind}{rank}d")(4, 8, 2, groups=4),
    )
]


@pytest.fixture
def own_rules(monkeypatch):
    """Registrations of one test do not reach the next."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


def pruned(module, neuron, **selection):
    """A copy of the module with one neuron zeroed."""
    module = copy.deepcopy(module)
    index = NeuronIndex(module, **selection)
    prune_neurons(module, torch.arange(len(index)) == neuron, index=index)
    return module


def assert_only_this_output_is_constant(module, x, neuron, changed, channels):
    with torch.no_grad():
        before, after = (run(x).movedim(1, 0).flatten(1) for run in (module, changed))
    assert len(before) == channels
    others = torch.arange(channels) != neuron
    torch.testing.assert_close(after[others], before[others])
    assert (before[neuron].std() > 0).all()
    torch.testing.assert_close(after[neuron], module.bias[neuron].expand_as(after[neuron]), rtol=0, atol=0)


@pytest.mark.parametrize("module", CONVOLUTIONS)
def test_a_neuron_of_a_convolution_is_an_output_channel(module):
    rank = module.weight.ndim - 2
    x = torch.randn(3, 4, *[4] * rank, generator=torch.Generator().manual_seed(0))
    assert len(NeuronIndex(module)) == module.out_channels
    for neuron in range(module.out_channels):
        changed = pruned(module, neuron)
        assert_only_this_output_is_constant(module, x, neuron, changed, module.out_channels)


def test_a_neuron_of_a_linear_layer_is_an_output():
    module, x = nn.Linear(5, 3), torch.randn(4, 5)
    for neuron in range(3):
        assert_only_this_output_is_constant(module, x, neuron, pruned(module, neuron), 3)


def test_a_neuron_of_a_bilinear_layer_is_an_output():
    module, x = nn.Bilinear(2, 5, 3), torch.randn(4, 2)
    y = torch.randn(4, 5)
    out = pruned(module, 1)(x, y)
    assert torch.equal(out[:, 1], module.bias[1].expand(4))
    torch.testing.assert_close(out[:, ::2], module(x, y)[:, ::2])


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm1d(4).eval(), nn.InstanceNorm1d(4, affine=True), nn.GroupNorm(2, 4)],
    ids=lambda module: type(module).__name__,
)
def test_a_neuron_of_a_normalisation_is_the_scale_of_a_channel(module):
    x = torch.randn(3, 4, 5)
    for neuron in range(4):
        changed = pruned(module, neuron, kinds="norm")
        assert_only_this_output_is_constant(module, x, neuron, changed, 4)


@pytest.mark.parametrize("module", [nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4))], ids=["LayerNorm", "RMSNorm"])
def test_a_neuron_of_a_normalisation_over_several_dimensions_is_one_element(module):
    index = NeuronIndex(module, kinds="norm")
    assert [tuple(view.shape) for view in index.rows(module)] == [(12, 1)]
    out = pruned(module, 6, kinds="norm")(torch.randn(2, 3, 4))
    assert (out == 0).nonzero().tolist() == [[0, 1, 2], [1, 1, 2]]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_neuron_of_an_embedding_is_a_token(kind):
    module = kind(5, 3)
    out = pruned(module, 2)(torch.arange(5)[:, None]).reshape(5, 3)
    assert (out == 0).all(1).tolist() == [False, False, True, False, False]


def test_attention_has_packed_rows_and_an_output_projection_of_its_own():
    module = nn.MultiheadAttention(8, 2)
    index = NeuronIndex(module)
    assert [(layer.parameter, layer.kind, len(layer)) for layer in index.layers] == [
        ("in_proj_weight", "attention", 24),
        ("out_proj.weight", "linear", 8),
    ]
    assert torch.equal(index.rows(module)[0], module.in_proj_weight)


def test_attention_with_other_widths_has_separate_projections():
    index = NeuronIndex(nn.MultiheadAttention(8, 2, kdim=4, vdim=6), kinds="attention")
    assert [(layer.parameter, tuple(layer.shape)) for layer in index.layers] == [
        ("q_proj_weight", (8, 8)),
        ("k_proj_weight", (8, 4)),
        ("v_proj_weight", (8, 6)),
    ]


def test_normalisation_without_scales_has_no_neurons():
    module = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3))
    assert [layer.module for layer in NeuronIndex(module, kinds="norm").layers] == ["1"]


def test_subclasses_follow_the_rule_of_their_nearest_base(own_rules):
    class Parent(nn.Linear):
        pass

    class Child(Parent):
        pass

    assert NeuronIndex(Child(3, 4)).layers[0].kind == "linear"
    register_neurons(Parent, kind="gate")(lambda module: {"weight": 1})
    assert (NeuronIndex(Child(3, 4)).layers[0].kind, len(NeuronIndex(Child(3, 4)))) == ("gate", 3)
    register_neurons(Child, kind="gate")(lambda module: {})
    assert len(NeuronIndex(nn.Sequential(Child(3, 4), nn.Linear(3, 5)))) == 5


class InputFirstLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_one_registration_adds_a_module_type(own_rules):
    @register_neurons(InputFirstLinear, kind="linear")
    def rule(module):
        return {"weight": 1}

    module, x = InputFirstLinear(), torch.randn(4, 5)
    for neuron in range(3):
        assert_only_this_output_is_constant(module, x, neuron, pruned(module, neuron), 3)


def test_a_new_kind_can_be_selected(own_rules):
    with pytest.raises(ValueError, match=r"kinds\[0\]: expected .*, got 'expert';"):
        NeuronIndex(nn.Linear(2, 2), kinds="expert")
    register_neurons(InputFirstLinear, kind="expert")(lambda module: {"weight": 1})
    model = nn.Sequential(InputFirstLinear(), nn.Linear(3, 4))
    assert len(NeuronIndex(model, kinds="expert")) == 3
    assert len(NeuronIndex(model)) == 7


@pytest.mark.parametrize(
    ("split", "fault"),
    [(lambda weight: [weight.T.contiguous()], "a copy"), (lambda weight: [weight[0, 0]], "a scalar")],
)
def test_a_rule_must_return_views_with_rows(own_rules, split, fault):
    register_neurons(InputFirstLinear, kind="linear")(lambda module: {"weight": split})
    with pytest.raises(ValueError, match=rf"rule of 'weight': expected as view 0 .*, got {fault};"):
        NeuronIndex(InputFirstLinear())


@pytest.mark.parametrize("module_type", [nn.Linear(1, 1), int, "Linear"])
def test_only_module_types_can_be_registered(module_type):
    with pytest.raises(TypeError, match=r"module_types\[1\]: expected a subclass .*, got "):
        register_neurons(nn.Linear, module_type, kind="linear")


def test_quantised_weights_are_not_neurons():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    model[0].weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    assert [layer.parameter for layer in NeuronIndex(model).layers] == ["1.weight"]


def test_computed_weights_are_not_neurons():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6))
    nn.utils.parametrizations.weight_norm(model[0])
    prune.l1_unstructured(model[1], "weight", amount=1)
    assert [layer.parameter for layer in NeuronIndex(model).layers] == ["2.weight"]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules_are_indexed_once_they_have_a_shape():
    model = nn.Sequential(nn.LazyConvTranspose2d(6, 2, groups=2), nn.LazyLinear(5))
    with pytest.raises(ValueError, match=r"model\['0.weight'\]: expected .*, got .* not initialised; run one"):
        NeuronIndex(model)
    model(torch.randn(1, 4, 3, 3))
    assert [len(layer) for layer in NeuronIndex(model).layers] == [6, 5]


def test_an_index_survives_copy_and_pickle():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.LayerNorm(3), nn.MultiheadAttention(8, 2))
    index = NeuronIndex(model, kinds=("conv", "norm", "attention"))
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert other.layers == index.layers
        for a, b in zip(other.rows(model), index.rows(model), strict=True):
            assert torch.equal(a, b)
