"""Random checkpoints around known weights: they are loaded right, or refused by a ValueError that names the argument.

`python tests/io/test_checkpoint_fuzz.py` prints how many were which.
"""

import argparse
import sys
import tempfile
import warnings
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from bdfast.io.checkpoints import load_into, load_weights
from bdfast.models import normalized

CASES = 2000
KNOWN = ["module", "_orig_mod", "model", "network", "net", "_module", "ema"]
KEYS = ["state_dict", "model", "net", "netC", "model_state_dict", "weights", "ema", "params", "victim", "x", "0", ""]
COUNTED: Counter[str] = Counter()


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
        model[1].running_mean.normal_()
        model[1].num_batches_tracked.fill_(seed + 5)
    return model


STATE = dict(network(0).state_dict())
DECOY = {name: value + 1 for name, value in STATE.items()}
MASKS = {
    name: (torch.arange(value.numel()) % 2).view_as(value).float() for name, value in STATE.items() if "1." not in name
}


class Holder(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = network(seed)


# Each builds a model, and says what its names put in front of those of the network.
MODELS = {
    "plain": (network, ""),
    "DataParallel": (lambda seed: nn.DataParallel(network(seed)), "module."),
    "names start with model": (Holder, "model."),
    "normalised": (lambda seed: normalized(network(seed), [0.5], [0.25]), "network."),
}
BESIDE = {
    "epoch": 3,
    "best_acc": np.float64(93.1),
    "note": "text",
    "nothing": None,
    "images": {"x": torch.zeros(2, 1, 4, 4), "y": torch.zeros(2), "index": np.array([1, 2])},
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.ones(())}}, "param_groups": [{"lr": 0.1}]},
    "lr": torch.tensor(0.1),
    "counts": Counter({3: 1}),
    "generator": {"0.weight": torch.zeros(4, 4), "1.weight": torch.zeros(2)},
}
INSIDE = {
    "thop": {"total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)},
    "averaged": {"n_averaged": torch.tensor(3)},
    "extra state": {"1._extra_state": torch.ones(2)},
    "number": {"epoch": 3},
    "text": {"0.note": "text"},
    "numpy": {"scale": np.ones(2)},
}
TELLS = {"extra state", "number", "text", "numpy"}  # are left out, and a warning names them
DAMAGES = [None, None, None, None, None, "lacks", "reshaped", "renamed", "complex", "stretched", "unknown", "class"]


@st.composite
def cases(draw):
    one_in = lambda n: draw(st.integers(0, n - 1)) == 0  # noqa: E731
    return {
        "model": draw(st.sampled_from(list(MODELS))),
        "prefix": draw(st.lists(st.sampled_from([*KNOWN, *KNOWN, "backbone", "basic_net"]), max_size=4)),
        "within": draw(st.sampled_from([None, None, None, "_orig_mod", "module"])),
        "counted": not one_in(4),
        "half": one_in(6),
        "pruned": draw(st.sets(st.sampled_from(sorted(MASKS)), max_size=2)) if one_in(4) else set(),
        "inside": draw(st.sets(st.sampled_from(sorted(INSIDE)), max_size=2)) if one_in(3) else set(),
        "criterion": one_in(6),
        "damage": draw(st.sampled_from(DAMAGES)),
        "damaged": draw(st.sampled_from(sorted(STATE))),
        "shuffled": one_in(4),
        "keys": draw(st.lists(st.one_of(st.sampled_from(KEYS), st.text(max_size=3), st.just(7)), max_size=3)),
        "beside": draw(st.sets(st.sampled_from(sorted(BESIDE)), max_size=3)),
        "decoy": draw(st.sampled_from([None, None, None, "model", "ema", "y", "state_dict"])),
        "kind": draw(st.sampled_from(["dict", "OrderedDict", "Parameter"])),
        "format": draw(st.sampled_from(["zip", "zip", "older", "safetensors"])),
    }


def weights_of(case) -> dict[str, torch.Tensor]:
    """What a right load gives, by the names of the network."""
    state = dict(STATE)
    for name in case["pruned"]:
        state[name] = STATE[name] * MASKS[name]
    if case["half"]:
        state = {name: value.half().to(value.dtype) for name, value in state.items()}
    return state


def state_dict_of(case) -> dict:
    """The weights as the file has them."""
    state = dict(STATE)
    for name in case["pruned"]:
        state = {k: v for k, v in state.items() if k != name} | {
            f"{name}_orig": STATE[name],
            f"{name}_mask": MASKS[name],
        }
    if case["half"]:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    if not case["counted"]:
        state = {name: value for name, value in state.items() if "num_batches" not in name}
    name = case["damaged"]
    if case["damage"] in ("lacks", "renamed", "reshaped", "complex", "stretched"):
        for part in (name, f"{name}_orig", f"{name}_mask"):
            state.pop(part, None)
        changed = {
            "lacks": {},
            "renamed": {f"{name}s": STATE[name]},
            "reshaped": {name: torch.zeros(5, 5)},
            "complex": {name: torch.full(STATE[name].shape, 1j)},
            "stretched": {name: torch.zeros(1).expand(10**9)},
        }
        state |= changed[case["damage"]]
    elif case["damage"] == "unknown":
        state |= {"4.weight": torch.zeros(3, 3)}
    for inside in sorted(case["inside"]):
        state |= INSIDE[inside]
    if case["shuffled"]:
        state = dict(sorted(state.items(), reverse=True))
    if case["within"]:
        state = {x.replace("3.", f"3.{case['within']}.") if x.startswith("3.") else x: v for x, v in state.items()}
    state = {"".join(f"{part}." for part in case["prefix"]) + name: value for name, value in state.items()}
    if case["criterion"]:
        state["criterion.weight"] = torch.ones(3)
    if case["kind"] == "OrderedDict":
        return OrderedDict(state)
    if case["kind"] == "Parameter":
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                state[name] = nn.Parameter(value)
    return state


def write(case, path: Path) -> bool:
    """Whether the decoy is in the file as well."""
    content = state_dict_of(case)
    tensors = all(isinstance(value, torch.Tensor) for value in content.values())
    if case["format"] == "safetensors" and tensors and case["damage"] not in ("stretched", "class"):
        save_file({name: value.detach().clone() for name, value in content.items()}, path)
        return False
    decoy = case["decoy"] is not None and len(case["keys"]) == 1 and case["keys"][0] != case["decoy"]
    for depth, key in enumerate(reversed(case["keys"])):
        around = {name: BESIDE[name] for name in sorted(case["beside"])}
        if decoy and depth == 0:
            around[case["decoy"]] = DECOY
        content = [content, *around.values()] if key == 7 else {**around, key: content}
    if case["damage"] == "class":
        content = [content, argparse.Namespace(lr=0.1)]
    torch.save(content, path, _use_new_zipfile_serialization=case["format"] != "older")
    return decoy


def must_load(case) -> bool:
    beside_prefix = bool(case["prefix"]) and set(case["prefix"]) <= set(KNOWN)
    harmless = case["damage"] is None or (case["damage"] == "lacks" and "num_batches" in case["damaged"])
    return harmless and (beside_prefix or not case["criterion"])


def check(case, path: Path) -> str:
    """Write the case, load it, and hold the outcome against what it should be."""
    with_decoy = write(case, path)
    build, front = MODELS[case["model"]]
    model = build(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        refusal = None
        with suppress(ValueError):
            assert all(type(value) is torch.Tensor for value in load_weights(path).values())
        said.clear()
        try:
            load_into(model, path)
        except ValueError as error:
            refusal = str(error)
    if refusal is not None:
        assert refusal.startswith("path: "), refusal
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert with_decoy or not must_load(case), (case, refusal)
        return "refused"
    text = " ".join(str(warning.message) for warning in said)
    lacking = {"1.num_batches_tracked"} if not case["counted"] or case["damage"] == "lacks" else set()

    def holds(weights) -> bool:
        expected = {**before, **{front + name: value for name, value in weights.items() if name not in lacking}}
        return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())

    if with_decoy and must_load(case):
        assert "took those" in text, case
        if case["decoy"] == "ema" and case["keys"] != [7]:  # plain weights are preferred
            assert holds(weights_of(case)), case
    if with_decoy and not holds(weights_of(case)):
        lacking = set()
        assert holds(DECOY), case
        return "other weights that fit, with a warning" if text else "other weights that fit"
    assert holds(weights_of(case)), case
    assert must_load(case), case
    prefix = "".join(f"{part}." for part in case["prefix"])
    for inside in TELLS & case["inside"]:
        assert repr(prefix + next(iter(INSIDE[inside]))) in text, (case, text)
    return "loaded, with a warning" if text else "loaded"


@pytest.mark.slow
@pytest.mark.usefixtures("uncounted")  # other tests reach the same lines
@settings(max_examples=CASES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_random_checkpoints_load_right_or_are_refused(case):
    with tempfile.TemporaryDirectory() as folder:
        COUNTED[check(case, Path(folder) / "a")] += 1


if __name__ == "__main__":
    test_random_checkpoints_load_right_or_are_refused()
    sys.stdout.write(f"{sum(COUNTED.values())} cases: {dict(COUNTED.most_common())}\n")
