"""What bdfast wrote, it reads again: from compiled, wrapped, tied, pruned and normalised models, into any of them."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

import bdfast
from bdfast.io.checkpoints import load_into, load_weights, save_weights
from bdfast.models import normalized


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_part(model: nn.Sequential) -> nn.Module:
    model[0] = compiled(model[0])
    return model


WRAPPERS = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "DataParallel of compiled": lambda model: nn.DataParallel(compiled(model)),
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "compiled in part": compiled_in_part,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_the_file_has_the_names_of_the_network(tmp_path, wrap):
    expected = network().state_dict()
    save_weights(wrap(network()), tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == load_weights(tmp_path / "a.safetensors").keys()
    assert load_file(tmp_path / "a.safetensors").keys() == expected.keys()
    for again in (network(1), wrap(network(1))):
        loaded = load_into(again, tmp_path / "a.safetensors").state_dict()
        assert all(torch.equal(x, y) for x, y in zip(loaded.values(), expected.values(), strict=True))


def test_a_purified_compiled_model_is_loaded_again(tmp_path):
    clean = TensorDataset(torch.rand(32, 1, 4, 4), torch.arange(32) % 4)
    for wrap in (compiled, nn.DataParallel):
        result = bdfast.purify(wrap(network()), clean, method="ft", epochs=1, lr=0.01, amp=False, augment=None)
        result.save(tmp_path / "out")
        again = load_into(network(1), tmp_path / "out" / "model.safetensors").eval()
        images = torch.rand(2, 1, 4, 4)
        assert torch.equal(again(images), result.model.eval()(images))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def pruned() -> nn.Module:
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return model


def weight_normed() -> nn.Module:
    model = network()
    parametrizations.weight_norm(model[0])
    return model


OTHERS = {
    "tied": tied,
    "tied and compiled": lambda: compiled(tied()),
    "pruned": pruned,
    "weight norm": weight_normed,
    "normalised": lambda: normalized(network(), [0.5], [0.25]),
    "normalised and compiled": lambda: normalized(compiled(network()), [0.5], [0.25]),
    "averaged": lambda: AveragedModel(network()),
    "channels last": lambda: network().to(memory_format=torch.channels_last),
    "bfloat16": lambda: network().bfloat16(),
    "part called module": lambda: nn.Sequential(nn.ModuleDict({"module": nn.Linear(2, 2), "model": nn.Linear(2, 2)})),
    "all behind module": lambda: nn.ModuleDict({"module": network()}),
    "one parameter": lambda: nn.ParameterDict({"module": torch.ones(3)}),
    "frozen and empty": lambda: nn.Sequential(nn.Linear(0, 2), network()).requires_grad_(False),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS.keys())
def test_every_tensor_comes_back(tmp_path, build):
    model = build()
    save_weights(model, tmp_path / "a.safetensors")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    load_into(model, tmp_path / "a.safetensors")
    loaded = model.state_dict()
    assert [name for name, value in expected.items() if not torch.equal(loaded[name], value)] == []


def test_pruned_weights_load_into_the_plain_network(tmp_path):
    model = pruned()
    save_weights(model, tmp_path / "a.safetensors")
    assert torch.equal(load_into(network(1), tmp_path / "a.safetensors")[0].weight, model[0].weight)
