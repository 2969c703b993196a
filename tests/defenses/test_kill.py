"""A purification that is killed without warning goes on where it was, and ends with the same bits."""

import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bdfast.io import load_weights

KILLS = 10

# Purifies in a process of its own for every line on standard input, a name and a number; importing torch so often would
# take a minute. The process kills itself at that call of a function, Python's or C's: unlike a moment on the clock, it
# comes whatever else the machine does.
SERVER = textwrap.dedent(
    """
    import os
    import signal
    import sys
    import torch
    torch.set_num_threads(1)
    import bdfast
    from torch import nn
    from bdfast.data.digits import digits_source
    from bdfast.io import save_weights

    calls = 0

    def network():
        torch.manual_seed(0)
        first = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        second = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        return nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))

    def purify(name, last):
        def count(frame, event, argument):
            global calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)

        model = network()
        clean = digits_source().train.subset(torch.arange(128))
        options = dict(method="pam", target=0, epochs=2, rounds=2, invert_epochs=2, batch_size=64, amp=False)
        if last != 0:
            sys.setprofile(count)
        result = bdfast.purify(model, clean, workdir=f"{sys.argv[1]}/{name}", **options)
        sys.setprofile(None)
        save_weights(result.model, f"{sys.argv[1]}/{name}.safetensors")

    for line in sys.stdin:
        name, last = line.split()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            purify(name, int(last))
            os.write(writing, str(calls).encode())
            os._exit(0)
        os.close(writing)
        counted = os.read(reading, 100).decode() or "0"
        os.close(reading)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), counted, flush=True)
    """
)


@pytest.fixture
def purify(tmp_path: Path) -> Iterator[Callable[..., tuple[int, int]]]:
    """Runs a purification, up to a call if one is given; returns how it ended and, with -1, how many calls it made."""
    command = [sys.executable, "-c", SERVER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(name: str, last: int = 0) -> tuple[int, int]:
            server.stdin.write(f"{name} {last}\n")
            server.stdin.flush()
            ended, calls = server.stdout.readline().split()
            return int(ended), int(calls)

        yield run


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path, purify):
    ended, calls = purify("undisturbed", -1)
    assert ended == 0
    expected = load_weights(tmp_path / "undisturbed.safetensors")
    moments = random.Random(0)
    for index in range(KILLS):
        assert purify(f"run{index}", moments.randrange(1, int(0.95 * calls)))[0] == -signal.SIGKILL
        assert not (tmp_path / f"run{index}.safetensors").exists()
        assert purify(f"run{index}")[0] == 0
        weights = load_weights(tmp_path / f"run{index}.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
