"""Names of a file and of a model: which differences are bridged, and what is refused with nothing changed."""

import warnings

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bdfast.io.checkpoints import load_into, save_weights
from bdfast.models import normalized


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
        model[1].running_mean.normal_()
        model[1].num_batches_tracked.fill_(seed + 5)
    return model


STATE = dict(network().state_dict())


def behind(prefix: str, state=STATE) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def other(state=STATE) -> dict[str, torch.Tensor]:
    return {name: value + 1 for name, value in state.items()}


def assert_loaded(model: nn.Module, state=STATE) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert [name for name, value in state.items() if not torch.equal(loaded[name], value)] == []


def assert_refused(content, path, match: str, **options) -> str:
    """Refused with this message, and the model is as it was."""
    torch.save(content, path)
    model = network(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match) as refusal:
        load_into(model, path, **options)
    assert_loaded(model, before)
    return str(refusal.value)


class Holder(nn.Module):
    """A network all of whose names start with "model."."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = network(seed)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "model.model.", "_orig_mod.network.model."])
def test_a_networks_own_names_may_look_like_a_prefix(tmp_path, prefix):
    torch.save(behind(prefix), tmp_path / "a.pt")
    assert_loaded(load_into(Holder(1), tmp_path / "a.pt").model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda m: torch.compile(m, backend="eager"), Holder])
def test_the_model_may_be_the_wrapped_one(tmp_path, wrap):
    model = wrap(1) if wrap is Holder else wrap(network(1))
    for prefix in ("", "module.", "model.", "backbone."):
        torch.save(behind(prefix), tmp_path / "a.pt")
        load_into(model, tmp_path / "a.pt")
        loaded = [value for name, value in model.state_dict().items() if name != "n_averaged"]
        assert all(torch.equal(value, expected) for value, expected in zip(loaded, STATE.values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "module.", "network."])
def test_input_normalisation_need_not_be_in_the_file(tmp_path, prefix):
    torch.save({"net": behind(prefix)}, tmp_path / "a.pt")
    model = load_into(normalized(network(1), [0.5], [0.25]), tmp_path / "a.pt")
    assert_loaded(model.network)
    images = torch.rand(2, 1, 4, 4)
    assert torch.equal(model.eval()(images), network().eval()((images - 0.5) / 0.25))


def test_a_normalised_network_is_not_loaded_without_its_normalisation(tmp_path):
    save_weights(normalized(network(), [0.5], [0.25]), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="the network in the file normalises its input: build this one with the same"):
        load_into(network(1), tmp_path / "a.safetensors")
    again = load_into(normalized(network(1), [0.1], [0.1]), tmp_path / "a.safetensors")
    assert again.normalize.mean.item() == 0.5


def test_a_larger_network_that_holds_all_names_is_refused(tmp_path):
    larger = nn.Sequential(*network(), nn.Linear(4, 4))
    assert_refused(larger.state_dict(), tmp_path / "a.pt", "got 0 names missing, 2 unknown and 0 of another shape")
    torch.save(STATE, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="got 2 names missing, 0 unknown"):
        load_into(larger, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="names missing"):
        load_into(nn.Conv2d(1, 3, 3), tmp_path / "a.pt")  # a part of what is in the file


def test_names_that_differ_match_by_shape_only_on_request(tmp_path):
    renamed = {f"part{index}": value for index, value in enumerate(STATE.values())}
    text = assert_refused(renamed, tmp_path / "a.pt", "got 9 names missing, 9 unknown")
    assert "by_shape=True" in text
    assert_loaded(load_into(network(1), tmp_path / "a.pt", by_shape=True))
    stems = {name.replace("0.", "stem.").replace("3.", "head."): value for name, value in STATE.items()}
    torch.save(stems, tmp_path / "a.pt")
    assert_loaded(load_into(network(1), tmp_path / "a.pt", by_shape=True))
    save_file(stems, tmp_path / "a.safetensors")  # sorted by name; what each name ends with still tells
    assert_loaded(load_into(network(1), tmp_path / "a.safetensors", by_shape=True))


def test_shapes_that_leave_a_choice_are_refused(tmp_path):
    mixed = {f"x{index}": STATE[name] for index, name in enumerate(reversed(STATE))}
    assert_refused(mixed, tmp_path / "a.pt", "names missing", by_shape=True)
    save_file({f"part{index}": value for index, value in enumerate(STATE.values())}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="names missing"):
        load_into(network(1), tmp_path / "a.safetensors", by_shape=True)
    twins = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    turned = {
        "b.bias": torch.ones(3),
        "b.weight": torch.ones(3, 3),
        "a.bias": torch.ones(3),
        "a.weight": torch.ones(3, 3),
    }
    torch.save(turned, tmp_path / "a.pt")  # in order, a bias would meet a weight
    with pytest.raises(ValueError, match="names missing"):
        load_into(twins, tmp_path / "a.pt", by_shape=True)


def test_values_that_the_network_cannot_hold_are_refused(tmp_path):
    state = {**STATE, "1.num_batches_tracked": torch.tensor(2.5)}
    assert_refused(state, tmp_path / "a.pt", r"expected values of torch.int64 for '1.num_batches_tracked'")
    state = {**STATE, "3.bias": torch.zeros(4, dtype=torch.complex64)}
    assert_refused(state, tmp_path / "a.pt", r"expected values of torch.float32 for '3.bias' .* got torch.complex64")
    half = {name: value.half() for name, value in STATE.items()}
    torch.save(half, tmp_path / "a.pt")
    loaded = load_into(network(1), tmp_path / "a.pt").state_dict()
    assert all(torch.equal(loaded[name], value.to(loaded[name].dtype)) for name, value in half.items())


def tied(seed: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight.fill_(seed)
    model[1].weight = model[0].weight
    return model


def test_one_name_of_a_tied_tensor_is_enough_and_two_values_are_too_many(tmp_path):
    save_model(tied(3), tmp_path / "a.safetensors")
    model = load_into(tied(1), tmp_path / "a.safetensors")
    assert model[1].weight is model[0].weight
    assert model[0].weight.eq(3).all()
    state = {name: value.clone() for name, value in tied(3).state_dict().items()}
    torch.save(state | {"1.weight": torch.zeros(3, 3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"expected one value for '0\.weight' and '1\.weight'"):
        load_into(model, tmp_path / "a.pt")
    assert model[0].weight.eq(3).all()


def test_nothing_changes_when_the_model_itself_refuses(tmp_path):
    class Refusing(nn.Linear):
        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)
            raise RuntimeError("not like this")

    model = nn.Sequential(nn.Linear(2, 2), Refusing(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(other(before), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"path: expected weights .* got an error from it \(not like this\)"):
        load_into(model, tmp_path / "a.pt")
    assert_loaded(model, before)


def test_nothing_changes_when_a_warning_is_an_error(tmp_path):
    model = network(1)
    torch.save({**STATE, "epoch": 3}, tmp_path / "a.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'epoch'"):
            load_into(model, tmp_path / "a.pt")
    assert_loaded(model, dict(network(1).state_dict()))


def test_a_model_without_memory_is_refused(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    with torch.device("meta"):
        without_data = network(1)
    for model, kind in ((without_data, "on the meta device"), (nn.LazyLinear(3), "not initialised")):
        with pytest.raises(ValueError, match=f"model: expected tensors with data to load into, got .* {kind}"):
            load_into(model, tmp_path / "a.pt")
