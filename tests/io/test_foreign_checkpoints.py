"""Checkpoints that others wrote: where the weights stand in them, under which names, and beside what."""

import argparse
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from bdfast.io.checkpoints import load_into, load_weights, save_weights
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


WHERE = {
    "pytorch-cifar": {"net": STATE, "acc": 93.1, "epoch": 3},
    "tutorial": {"model_state_dict": STATE, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "WaNet": {"netC": STATE, "netG": {"a": torch.ones(2)}, "identity_grid": torch.zeros(1, 4, 4, 2), "best_acc": 93.0},
    "weights": {"weights": STATE},
    "a key that nobody knows": {"victim": STATE},
    "two keys": {"checkpoint": {"model": STATE, "lr": torch.tensor(0.1)}, "epoch": 3},
    "a list": [3, STATE],
    "Lightning": {"state_dict": behind("model."), "epoch": 1},
    "Lightning with a loss": {"state_dict": behind("backbone."), "hyper_parameters": {"lr": 0.1}},
    "torch.compile": behind("_orig_mod."),
    "DataParallel": behind("module."),
    "DataParallel of compiled": behind("module._orig_mod."),
    "compiled Lightning": {"state_dict": behind("model._orig_mod.module.")},
    "normalised wrapper": behind("network."),
    "adversarial training": {"net": behind("module.basic_net.")},
    "Opacus": behind("_module."),
    "AveragedModel": AveragedModel(network()).state_dict(),
    "AveragedModel of DataParallel": AveragedModel(nn.DataParallel(network())).state_dict(),
    "part in DataParallel": {
        name.replace("0.", "0.module.") if name[0] == "0" else name: value for name, value in STATE.items()
    },
    "thop": {**STATE, "total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)},
    "parameters": {name: nn.Parameter(value) if value.is_floating_point() else value for name, value in STATE.items()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "older format"])
@pytest.mark.parametrize("content", WHERE.values(), ids=WHERE.keys())
def test_weights_are_found_and_named(tmp_path, content, legacy):
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    assert_loaded(load_into(network(1), tmp_path / "a.pt"))


def test_batches_need_not_be_counted(tmp_path):
    torch.save({name: value for name, value in STATE.items() if "num_batches" not in name}, tmp_path / "a.pt")
    loaded = load_into(network(1), tmp_path / "a.pt").state_dict()
    assert loaded["1.num_batches_tracked"] == 6
    assert torch.equal(loaded["1.running_mean"], STATE["1.running_mean"])


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "weights", "a.safetensors"])
def test_the_first_bytes_decide_not_the_name(tmp_path, name):
    save_file(STATE, tmp_path / name)
    assert_loaded(load_into(network(1), tmp_path / name))
    for zipped in (True, False):
        torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert_loaded(load_into(network(1), tmp_path / name))


def test_backdoorbench_and_numpy_beside_the_weights(tmp_path):
    images = {"x": torch.zeros(2, 1, 8, 8), "y": torch.zeros(2).long(), "original_index": np.array([3, 5])}
    result = {"model_name": "preactresnet18", "num_classes": 4, "model": STATE, "img_size": (8, 8, 1)}
    result |= {"clean_data": "cifar10", "bd_train": images, "bd_test": images, "acc": np.float64(0.9)}
    result |= {"flag": np.bool_(True), "name": np.str_("x"), "seen": np.array("2020", "M8[D]")}
    result["record"] = np.zeros(2, [("a", "f4"), ("b", "i8")])
    torch.save(result, tmp_path / "attack_result.pt")
    assert_loaded(load_into(network(1), tmp_path / "attack_result.pt"))
    assert load_weights(tmp_path / "attack_result.pt").keys() == STATE.keys()


def test_files_of_both_numpy_generations(tmp_path):
    for new, old in ((b"numpy._core.multiarray", b"numpy.core.multiarray"), (b"", b"")):
        torch.save({"model": STATE, "x": np.ones(2), "y": np.int64(3)}, tmp_path / "a.pt", **OLDER)
        data = (tmp_path / "a.pt").read_bytes()
        (tmp_path / "a.pt").write_bytes(data.replace(new, old))
        assert_loaded(load_into(network(1), tmp_path / "a.pt"))


OLDER = {"_use_new_zipfile_serialization": False}


def test_a_namespace_is_named_and_nothing_unsafe_is_advised(tmp_path):
    text = assert_refused(
        {"state_dict": STATE, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pt", r"'argparse\.Namespace'"
    )
    assert text.startswith("path: expected a safetensors file or a state dict in ")
    assert "torch.save(model.state_dict(), ...)" in text
    for advice in ("weights_only", "add_safe_globals", "\x1b", "\n"):
        assert advice not in text


def test_a_whole_module_is_refused_by_the_name_of_its_class(tmp_path):
    assert_refused({"net": network()}, tmp_path / "a.pt", r"'torch\.nn\.modules\.container\.Sequential'")


def test_masks_of_pruning_are_multiplied_in(tmp_path):
    pruned = network()
    prune.l1_unstructured(pruned[0], "weight", amount=0.5)
    prune.random_unstructured(pruned[3], "bias", amount=2)
    torch.save({"net": behind("module.", pruned.state_dict())}, tmp_path / "a.pt")
    loaded = load_into(network(1), tmp_path / "a.pt")
    assert torch.equal(loaded[0].weight, pruned[0].weight)
    assert (loaded[0].weight == 0).sum() >= loaded[0].weight.numel() // 2
    assert torch.equal(loaded[3].bias, pruned[3].bias)
    assert load_weights(tmp_path / "a.pt").keys() == STATE.keys()

    again = network(1)  # a pruned network takes both parts as they are
    prune.identity(again[0], "weight")
    prune.identity(again[3], "bias")
    assert_loaded(load_into(again, tmp_path / "a.pt"), pruned.state_dict())


def test_what_is_no_weight_is_left_out_and_named(tmp_path):
    extra = {"epoch": 3, "0._extra_state": torch.ones(2), "note": "text", "config": {"a": 1}}
    torch.save({**STATE, **extra}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=r"left out .*'epoch' \(int\), '0._extra_state' \(extra state\), 'note'"):
        assert_loaded(load_into(network(1), tmp_path / "a.pt"))
    with pytest.warns(UserWarning, match=r"'epoch' \(int\)"):
        assert load_weights(tmp_path / "a.pt").keys() == STATE.keys()


def test_extra_state_never_reaches_the_module(tmp_path):
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return torch.ones(1)

        def set_extra_state(self, state):
            raise AssertionError("called with what stands in the file")

    torch.save({**Stateful(2, 2).state_dict()}, tmp_path / "a.pt")
    model = Stateful(2, 2)
    with pytest.warns(UserWarning, match="extra state"):
        load_into(model, tmp_path / "a.pt")
    assert torch.equal(model.weight, torch.load(tmp_path / "a.pt", weights_only=True)["weight"])
    with pytest.warns(UserWarning, match=r"model: not written .* '_extra_state' \(extra state\)"):
        save_weights(model, tmp_path / "b.safetensors")
    load_into(model, tmp_path / "b.safetensors")


def test_other_tensors_beside_the_network_are_named(tmp_path):
    torch.save({"state_dict": {**behind("model."), "criterion.weight": torch.ones(4)}}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=r"left out .*'criterion.weight' \(beside the network\)"):
        assert_loaded(load_into(network(1), tmp_path / "a.pt"))


@pytest.mark.parametrize("keys", [("model", "ema"), ("ema", "model"), ("net", "model_ema"), ("state_dict", "net")])
def test_of_two_that_fit_the_plain_one_is_taken_with_a_warning(tmp_path, keys):
    taken, left = sorted(keys, key=["state_dict", "model", "net", "ema", "model_ema"].index)
    torch.save({key: STATE if key == taken else other() for key in keys}, tmp_path / "a.pt")
    for load in (
        lambda: load_into(network(1), tmp_path / "a.pt").state_dict(),
        lambda: load_weights(tmp_path / "a.pt"),
    ):
        with pytest.warns(UserWarning, match=f"took .* under '{taken}'.*, not those under '{left}'"):
            loaded = load()
        assert all(torch.equal(loaded[name], value) for name, value in STATE.items())


def test_averaged_weights_behind_a_prefix_come_last(tmp_path):
    for averaged in ("ema.", "ema_"):
        torch.save({**behind(averaged, other()), **STATE}, tmp_path / "a.pt")
        with pytest.warns(UserWarning) as said:
            assert_loaded(load_into(network(1), tmp_path / "a.pt"))
        assert f"left out of {tmp_path / 'a.pt'}: '{averaged}0.weight' (beside the network)" in str(said[0].message)
    torch.save({**behind("ema_model.module.", other()), **behind("model.")}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=r"behind 'model\.', not those .* behind 'ema_model\.module\.'"):
        assert_loaded(load_into(network(1), tmp_path / "a.pt"))


def test_two_that_are_the_same_need_no_warning(tmp_path):
    torch.save({"model": STATE, "ema": {name: value.clone() for name, value in STATE.items()}}, tmp_path / "a.pt")
    assert_loaded(load_into(network(1), tmp_path / "a.pt"))


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
    swapped = dict(zip(STATE, [STATE[name] for name in STATE], strict=True))
    names = list(swapped)
    mixed = {f"x.{name.rpartition('.')[2]}": swapped[name] for name in [names[3], names[2], *names[:2], *names[4:]][:4]}
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
    with pytest.raises(ValueError, match="expected one value for '0.weight' and '1.weight'"):
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
