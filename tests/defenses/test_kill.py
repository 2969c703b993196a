"""A purification that is killed without warning goes on where it was, and ends with the same bits."""

import json
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bdfast.defenses import METHODS
from bdfast.io import load_weights

KILLS = 10

# Purifies in a process of its own for every line on standard input: a folder, a name, a number and options. Importing
# torch so often would take minutes. The process kills itself at that call of a function, Python's or C's: unlike a
# moment on the clock, it comes whatever else the machine does.
SERVER = textwrap.dedent(
    """
    import json
    import os
    import signal
    import sys
    import warnings
    import torch
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import bdfast
    from torch import nn
    from bdfast.data.digits import digits_source
    from bdfast.io import save_weights
    from bdfast.inversion import least_length, patches, universal
    from bdfast.training import fit

    # Enough for a search that takes its course, not for one that finds something.
    patches.STEPS = least_length.STEPS = 1
    universal.JUDGED = patches.PER_STEP = 4
    calls = 0
    source = digits_source()
    clean = source.train.subset(torch.arange(64))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())

        def forward(self, x):
            return x + self.branch(x)

    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())
    model = nn.Sequential(first, Block(), nn.Flatten(), nn.Linear(54, 10))
    fit(model, source.train.subset(torch.arange(64, 1000)), epochs=4, amp=False)

    def purify(folder, name, last, options):
        def count(frame, event, argument):
            global calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)

        if last != 0:
            sys.setprofile(count)
        result = bdfast.purify(model, clean, workdir=f"{folder}/{name}", batch_size=32, amp=False, **options)
        sys.setprofile(None)
        save_weights(result.model, f"{folder}/{name}.safetensors")

    for line in sys.stdin:
        folder, name, last, options = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            purify(folder, name, last, options)
            os.write(writing, str(calls).encode())
            os._exit(0)
        os.close(writing)
        counted = os.read(reading, 100).decode() or "0"
        os.close(reading)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), counted, flush=True)
    """
)

STAGE = {"lr": 0.01, "epochs": 2}
UNLEARNING = {"unlearn_lr": 0.05, "unlearn_to": 0.5}

# Two epochs of everything that a method trains.
SHORT = {
    "uau": {"lr": 0.01, "rounds": 2, "epochs": 1},
    "pam": {**STAGE, "target": 0, "rounds": 2, "invert_epochs": 2},
    "ft_sam": STAGE,
    "tsbd": {**STAGE, **UNLEARNING, "n": 0.2},
    "sau": STAGE,
    "i_bau": {"lr": 0.01, "epochs": 1, "rounds": 2, "iterations": 1},
    "ft": {"updates": 2},  # with selection
    "sam": STAGE,
    "ulrl": {**STAGE, **UNLEARNING},
    "rnp": {**UNLEARNING, "recover_updates": 2},  # with selection
    "anp": {"threshold": 0.9, "updates": 2},
    "ims": {"threshold": 1.0, "first_rounds": 2, "rounds": 2, "steps": 1},
    "clp": {"u": 1.0},
    "otbr": {"gamma": 0.3, "unlearn_steps": 2, "unlearn_batch": 8},
    "ssft": {**STAGE, **UNLEARNING},
    "fine_pruning": STAGE,
    "nad": STAGE,
    "fst": STAGE,
    "d3": STAGE,
}

Purify = Callable[..., tuple[int, int]]


@pytest.fixture(scope="module")
def purify() -> Iterator[Purify]:
    """Runs a purification, up to a call if one is given; returns how it ended and, with -1, how many calls it made."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def run(folder: Path, name: str, last: int, options: dict) -> tuple[int, int]:
            server.stdin.write(json.dumps([str(folder), name, last, options]) + "\n")
            server.stdin.flush()
            ended, calls = server.stdout.readline().split()
            return int(ended), int(calls)

        yield run


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_killed_at_ten_random_moments(method, tmp_path, purify):
    options = {"method": method, **SHORT[method]}
    ended, calls = purify(tmp_path, "undisturbed", -1, options)
    assert ended == 0
    expected = load_weights(tmp_path / "undisturbed.safetensors")
    moments = random.Random(0)
    for index in range(KILLS):
        last = moments.randrange(1, int(0.95 * calls))
        assert purify(tmp_path, f"run{index}", last, options)[0] == -signal.SIGKILL
        assert not (tmp_path / f"run{index}.safetensors").exists()
        assert purify(tmp_path, f"run{index}", 0, options)[0] == 0
        weights = load_weights(tmp_path / f"run{index}.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
