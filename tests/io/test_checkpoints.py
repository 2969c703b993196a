import pickle

import pytest
import torch
from torch import nn

from bdfast.io.checkpoints import load_into, load_weights, read_description, save_weights


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint was executed')",))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_weights_and_description_round_trip(tmp_path):
    first, second = model(), model()
    save_weights(first, tmp_path / "a.safetensors", description='{"arch": "x"}')
    load_into(second, tmp_path / "a.safetensors")
    assert all(torch.equal(first.state_dict()[name], value) for name, value in second.state_dict().items())
    assert read_description(tmp_path / "a.safetensors") == '{"arch": "x"}'
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_tied_weights_are_stored(tmp_path):
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    save_weights(tied, tmp_path / "tied.safetensors")
    assert set(load_weights(tmp_path / "tied.safetensors")) == set(tied.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "model_name": "x", "num_classes": 4},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {f"module.{name}": value for name, value in state.items()},
    ],
    ids=["plain", "BackdoorBench", "training script", "DataParallel"],
)
def test_state_dicts_of_others(tmp_path, wrap):
    state = model().state_dict()
    torch.save(wrap(state), tmp_path / "a.pt")
    loaded = load_weights(tmp_path / "a.pt")
    assert set(loaded) == set(state)
    assert read_description(tmp_path / "a.pt") is None


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"model": Hostile()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="path: expected a safetensors file or a state dict"):
            load_weights(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": "text"}, torch.zeros(2)])
def test_other_content_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="got something else"):
        load_weights(tmp_path / "a.pt")


def test_another_architecture_is_refused_and_nothing_is_loaded(tmp_path):
    save_weights(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), tmp_path / "a.safetensors")
    target = model()
    before = target[0].weight.clone()
    with pytest.raises(ValueError, match=r"got 5 names missing, 0 unknown and 2 of another shape .*'0.bias'"):
        load_into(target, tmp_path / "a.safetensors")
    assert torch.equal(target[0].weight, before)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_weights(model(), path)
    old = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bdfast.io.checkpoints.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_weights(model(), path)
    assert path.read_bytes() == old
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]
