"""Checkpoints that others wrote: where the weights stand in them, under which names, and beside what."""

import argparse
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from bdfast.io.checkpoints import load_into, load_weights, save_weights


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


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "older format"])
def test_whatever_torch_saves_safely_may_stand_beside_the_weights(tmp_path, legacy):
    scheduler = torch.optim.lr_scheduler.MultiStepLR(torch.optim.Adam(network().parameters()), [3, 5])
    tensor = torch.ones(3)
    tensor.note = {"a": 1}
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "text"
    beside = {
        "scheduler": scheduler.state_dict(),
        "optimizer": scheduler.optimizer.state_dict(),
        "rng": [torch.get_rng_state(), np.random.RandomState(0).get_state()],
        "nothing": [np.zeros(0), b"", "", (), [], {}, set(), OrderedDict(), Counter()],
        "kinds": (torch.Size([2, 3]), torch.device("cuda:0"), torch.float16, 1j, {3, "a"}, b"bytes", 2**70, None, True),
        "tensors": [tensor, parameter, torch.ones(2, 2).T, torch.ones(1).expand(4)],
    }
    if not legacy:  # which cannot hold it
        beside["uint16"] = torch.ones(3, dtype=torch.uint16)
    torch.save({"state_dict": STATE, **beside}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    assert_loaded(load_into(network(1), tmp_path / "a.pt"))


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
        with pytest.warns(UserWarning, match=rf"left out of .*: '{averaged}0\.weight' \(beside the network\)"):
            assert_loaded(load_into(network(1), tmp_path / "a.pt"))
    torch.save({**behind("ema_model.module.", other()), **behind("model.")}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=r"behind 'model\.', not those .* behind 'ema_model\.module\.'"):
        assert_loaded(load_into(network(1), tmp_path / "a.pt"))


def test_two_that_are_the_same_need_no_warning(tmp_path):
    torch.save({"model": STATE, "ema": {name: value.clone() for name, value in STATE.items()}}, tmp_path / "a.pt")
    assert_loaded(load_into(network(1), tmp_path / "a.pt"))


def test_weights_that_almost_fit_are_not_passed_over_in_silence(tmp_path):
    damaged = {name: value for name, value in STATE.items() if name != "3.bias"}
    torch.save({"model": damaged, "ema": STATE}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=r"took the weights under 'ema' .* under 'model' \(1 names do not agree\)"):
        assert_loaded(load_into(network(1), tmp_path / "a.pt"))
