"""Files that were made to do harm, or were damaged: each is refused with one plain message, and nothing runs."""

import os
import pickle
import random
import resource
import struct
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bdfast.io.checkpoints import load_into, load_weights, read_description, save_weights
from bdfast.models import ModelSpec


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def assert_refused(path, match: str) -> None:
    for read in (load_weights, lambda path: load_into(model(), path)):
        with pytest.raises(ValueError, match=match) as refusal:
            read(path)
        text = str(refusal.value)
        assert text.startswith("path: ")
        assert "weights_only" not in text
        assert text.isprintable()
        assert len(text) < 1000


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def rewritten(path, change) -> None:
    """The archive with its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "older format"])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Call(os.system, "exit 1"), r"'posix\.system'"),
        (Call(eval, "1"), r"'(__builtin__|builtins)\.eval'"),
        (Call(bytearray, 10**12), r"'(__builtin__|builtins)\.bytearray'"),
        (Call(torch.load, "/etc/passwd"), r"'torch\.serialization\.load'"),
        (Call(np.load, "/etc/passwd"), r"'numpy.*load'"),
        (np.array([1, None], object), "numpy array of objects"),
        (np.zeros(2, [("a", "f4"), ("b", "O")]), "numpy array of objects"),
        (torch.eye(3).to_sparse(), r"'torch\._utils\._rebuild_sparse_tensor'"),
        (torch.empty(3, device="meta"), r"'torch\._utils\._rebuild_meta_tensor_no_storage'"),
    ],
)
def test_what_a_checkpoint_does_not_need_is_refused_by_name(tmp_path, value, named, legacy):
    state = {"state_dict": model().state_dict(), "beside": value}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    assert_refused(tmp_path / "a.pt", named)


STRETCHED = torch.zeros(1).expand(10**10)


@pytest.mark.parametrize(
    "value",
    [
        Call(OrderedDict, STRETCHED),  # would take it apart into a tensor for each value
        Call(OrderedDict, [STRETCHED]),
        Call(Counter, STRETCHED),
        Call(set, STRETCHED),
        Call(torch.Size, STRETCHED),
        Call(torch.Tensor, [STRETCHED]),  # would copy it
        Call(torch.Tensor, 10**10),
        Call(torch.UntypedStorage, 10**10),
        Call(torch._tensor._rebuild_from_type_v2, OrderedDict, OrderedDict, (STRETCHED,), {}),
        Call(torch._tensor._rebuild_from_type_v2, torch.Tensor, torch.Tensor, (10**10,), {}),
    ],
)
def test_calls_that_would_fill_the_memory_are_refused(tmp_path, value):
    torch.save({"state_dict": model().state_dict(), "beside": value}, tmp_path / "a.pt")
    assert_refused(tmp_path / "a.pt", r"it calls '.*' as torch.save never does")


def test_attributes_that_would_fill_the_memory_are_refused(tmp_path):
    for state in (b"]", b"N", b"K\x01"):  # a list would be taken apart, the others fail
        torch.save({"beside": 1}, tmp_path / "a.pt")
        rewritten(tmp_path / "a.pt", lambda data, state=state: b"\x80\x02ccollections\nOrderedDict\n)R" + state + b"b.")
        assert_refused(tmp_path / "a.pt", "it changes a collections.OrderedDict as torch.save never does")


def test_numpy_is_not_called(tmp_path):
    state = model().state_dict()
    # As an array of this size the file would take a terabyte.
    claims = Call(np.zeros(0).__reduce__()[0], np.ndarray, (10**12,), b"d")
    torch.save({"state_dict": state, "beside": claims}, tmp_path / "a.pt")
    assert load_weights(tmp_path / "a.pt").keys() == state.keys()


def test_one_value_stretched_over_a_large_shape_is_refused(tmp_path):
    state = model().state_dict() | {"0.weight": torch.zeros(1).expand(10**12)}
    torch.save(state, tmp_path / "a.pt")
    assert_refused(tmp_path / "a.pt", r"'0.weight' \(of 4,000,000,000,000 bytes in a file of")
    pair = {"0.weight_orig": torch.zeros(1).expand(10**12), "0.weight_mask": torch.ones(1).expand(10**12)}
    torch.save(state | pair, tmp_path / "a.pt")
    assert_refused(tmp_path / "a.pt", r"'0.weight")


def test_a_storage_larger_than_the_file_is_refused(tmp_path):
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.save({"0.weight": torch.zeros(12)}, tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", lambda data: data.replace(b"K\x0c", b"J" + struct.pack("<i", 2**31 - 1)))
    torch.save({"0.weight": torch.zeros(12)}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "b.pt").read_bytes().replace(b"K\x0c", b"J" + struct.pack("<i", 2**31 - 1))
    (tmp_path / "b.pt").write_bytes(data)
    save_file({"0.weight": torch.zeros(12)}, tmp_path / "c.safetensors")
    data = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(data.replace(b"[12]", b"[9999999999]"[:4]).replace(b"48]", b"99]"))
    for name in ("a.pt", "b.pt", "c.safetensors"):
        assert_refused(tmp_path / name, "path: expected")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken < 1_000_000  # kB; asked for were 8 GB


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    torch.save({"0.weight": torch.zeros(10**6)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    assert_refused(tmp_path / "b.pt", "its archive unpacks to 4,000,")


def test_two_entries_of_one_name_are_refused(tmp_path):
    for again in ("a/data.pkl", "A/DATA.pkl"):
        torch.save(model().state_dict(), tmp_path / "a.pt")
        with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archive.writestr(again, pickle.dumps({}, 2))
        assert_refused(tmp_path / "a.pt", "several entries of its archive have one name")


def test_methods_that_a_file_replaces_are_not_called(tmp_path):
    state = OrderedDict(model().state_dict())
    weight = state["0.weight"] = nn.Parameter(state["0.weight"])
    for name in ("detach", "numel", "element_size", "clone", "to"):
        setattr(weight, name, torch.Size([1]))
    for name in ("itemZ", "keyZ", "valueZ"):
        setattr(state, name, torch.Size([1]))
    torch.save({"state_dict": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pt").read_bytes()
    for name in (b"item", b"key", b"value"):  # with these names already, nothing could write it
        data = data.replace(name + b"Z", name + b"s")
    (tmp_path / "a.pt").write_bytes(data)
    target = model()
    load_into(target, tmp_path / "a.pt")
    assert torch.equal(target[0].weight, weight)
    assert type(load_weights(tmp_path / "a.pt")["0.weight"]) is torch.Tensor


def test_a_dict_within_itself_ends(tmp_path):
    state = dict(model().state_dict())
    nested: dict = {"state_dict": state, "list": []}
    nested["again"] = nested
    nested["list"].append(nested["list"])
    torch.save(nested, tmp_path / "a.pt")
    assert load_weights(tmp_path / "a.pt").keys() == state.keys()
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    torch.save({"a": 1}, tmp_path / "b.pt")
    rewritten(tmp_path / "b.pt", lambda _: b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b".")
    assert_refused(tmp_path / "b.pt", "it holds a list without named tensors")


def test_names_from_a_file_are_shown_without_control_codes(tmp_path):
    torch.save({"\x1b[31m": torch.zeros(1), "a\nb": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"'\\x1b\[31m'") as refusal:
        load_into(model(), tmp_path / "a.pt")
    assert str(refusal.value).isprintable()
    with pytest.warns(UserWarning, match=r"left out .*'a\\nb' \(int\)") as said:
        load_weights(tmp_path / "a.pt")
    assert str(said[0].message).isprintable()


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "a.pt"
    for content in (
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<html>",
        b"\0" * 100,
        b"PK\x03\x04",
        b"\x80",
    ):
        path.write_bytes(content)
        assert_refused(path, "expected a safetensors file or a state dict")
    torch.save(model().state_dict(), path, pickle_protocol=4)
    assert_refused(path, "a pickle of protocol 4, torch.save's own is 2")
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    assert_refused(path, "a pickle that torch.save did not write")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/readme.txt", "")
    assert_refused(path, "a zip archive that torch.save did not write")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/constants.pkl", "")
    assert_refused(path, "TorchScript archive")
    with tarfile.open(path, "w") as tar:
        tar.add(__file__, "storages")
    assert_refused(path, "begins like neither")
    with pytest.raises(FileNotFoundError, match="path: expected a checkpoint"):
        load_weights(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert read_description(tmp_path / "pipe") is None


def test_what_was_read_does_not_follow_the_file(tmp_path):
    save_weights(model(), tmp_path / "a.safetensors")
    loaded = load_weights(tmp_path / "a.safetensors")
    before = {name: value.clone() for name, value in loaded.items()}
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.seek(8 + 200)
        file.write(b"\x01" * 500)
    assert all(torch.equal(loaded[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["zip", "older", "safetensors"])
def test_damaged_files_load_or_are_refused(tmp_path, kind):
    path, values = tmp_path / "a", random.Random(0)
    if kind == "safetensors":
        save_file(model().state_dict(), path)
    else:
        torch.save({"state_dict": model().state_dict()}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(150):
            data = bytearray(whole)
            if values.random() < 0.2:
                del data[values.randrange(len(data)) :]
            for _ in range(values.randrange(1, 4)):
                if data:
                    data[values.randrange(len(data))] = values.randrange(256)
            path.write_bytes(data)
            target = model()
            outcome = "path: loaded"
            try:
                load_into(target, path)
            except ValueError as error:
                outcome = str(error)
            assert outcome.startswith("path: ")


def test_descriptions_of_strangers(tmp_path):
    deep = '{"mean": ' + "[" * 100_000
    for text in (
        deep,
        '{"mean": ["a"], "std": [1]}',
        '{"mean": [], "std": [], "arch": 3}',
        '{"mean": [], "std": [], "stem": []}',
    ):
        with pytest.raises(ValueError, match="model description: expected one that bdfast wrote"):
            ModelSpec.from_json(text)
