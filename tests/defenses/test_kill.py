"""A purification that is killed without warning goes on where it was, and ends with the same bits."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bdfast.io import load_weights, save_weights
from bdfast.models import PreActResNet18

KILLS = 10

# Purifies in a process of its own for every name on standard input; importing torch so often would take a minute.
SERVER = textwrap.dedent(
    """
    import os
    import sys
    import torch
    torch.set_num_threads(1)
    import bdfast
    from bdfast.data.sources import digits_source
    from bdfast.io import load_into, save_weights
    from bdfast.models import PreActResNet18

    def purify(name):
        model = load_into(PreActResNet18(10, width=4, in_channels=1), f"{sys.argv[1]}/given.safetensors")
        clean = digits_source().train.subset(torch.arange(300))
        options = dict(method="pam", epochs=2, rounds=2, invert_epochs=2, batch_size=64, amp=False)
        result = bdfast.purify(model, clean, workdir=f"{sys.argv[1]}/{name}", **options)
        save_weights(result.model, f"{sys.argv[1]}/{name}.safetensors")

    for name in map(str.strip, sys.stdin):
        child = os.fork()
        if child == 0:
            print(os.getpid(), flush=True)
            purify(name)
            os._exit(0)
        print(os.waitpid(child, 0)[1], flush=True)
    """
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], tuple[int, Callable[[], int]]]]:
    """Starts a purification and gives its process, and a function that waits for its end."""
    command = [sys.executable, "-c", SERVER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def begin(name: str) -> tuple[int, Callable[[], int]]:
            server.stdin.write(f"{name}\n")
            server.stdin.flush()
            return int(server.stdout.readline()), lambda: int(server.stdout.readline())

        yield begin


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path, start):
    torch.manual_seed(0)
    save_weights(PreActResNet18(10, width=4, in_channels=1), tmp_path / "given.safetensors")
    _, ended = start("undisturbed")
    began = time.perf_counter()
    assert ended() == 0
    duration = time.perf_counter() - began
    expected = load_weights(tmp_path / "undisturbed.safetensors")
    moments = random.Random(0)
    killed = 0
    for index in range(KILLS):
        process, ended = start(f"run{index}")
        time.sleep(moments.uniform(0, 0.95) * duration)
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(process, signal.SIGKILL)
        if ended() != 0:
            killed += 1
            assert not (tmp_path / f"run{index}.safetensors").exists()
        _, ended = start(f"run{index}")
        assert ended() == 0
        weights = load_weights(tmp_path / f"run{index}.safetensors")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert killed >= KILLS // 2, "the kills came too late to say anything"
