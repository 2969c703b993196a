"""A run that is killed without warning goes on where it was, and leaves the records of an undisturbed one."""

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

from bdfast.cli import main
from bdfast.matrix import read_grid, run_grid

KILLS = 10

NETWORK = textwrap.dedent(
    """
    from torch import nn
    from bdfast.models import register_model

    def build(spec):
        first = nn.Conv2d(spec.in_channels, 4, 3, stride=2)
        return nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(36, spec.num_classes))

    register_model("speck", build)
    """
)
GRID = """
epochs: 1
networks: [{arch: speck, lr: 0.02}]
data: [digits]
attacks: [badnets, none]
clean: [0.1]
defenses: [none, {defense: ft, epochs: 2, lr: 0.02, amp: false, batch_size: 64}]
seeds: [0]
"""

# As in tests/defenses/test_kill.py: a fresh process for each line on standard input without importing torch so often,
# which kills itself at that call of a function.
SERVER = textwrap.dedent(
    """
    import os
    import signal
    import sys
    import torch
    torch.set_num_threads(1)
    import tests_network
    from bdfast.data.digits import digits_source
    from bdfast.matrix import read_grid, run_grid

    digits_source()  # imports scikit-learn, which takes longer than a run
    calls = 0

    def measure(name, last):
        def count(frame, event, argument):
            global calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)

        grid = read_grid("grid.yaml")
        if last != 0:
            sys.setprofile(count)
        run_grid(grid, name, threads=1)
        sys.setprofile(None)

    for line in sys.stdin:
        name, last = line.split()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            measure(name, int(last))
            os.write(writing, str(calls).encode())
            os._exit(0)
        os.close(writing)
        counted = os.read(reading, 100).decode() or "0"
        os.close(reading)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), counted, flush=True)
    """
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "grid.yaml").write_text(GRID)
    (tmp_path / "tests_network.py").write_text(NETWORK)
    return tmp_path


@pytest.fixture
def measure(folder: Path) -> Iterator[Callable[..., tuple[int, int]]]:
    """Runs the grid, up to a call if one is given; returns how it ended and, with -1, how many calls it made."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(name: str, last: int = 0) -> tuple[int, int]:
            server.stdin.write(f"{name} {last}\n")
            server.stdin.flush()
            ended, calls = server.stdout.readline().split()
            return int(ended), int(calls)

        yield run


@pytest.mark.slow
def test_killed_at_ten_random_moments(folder, measure, comparable):
    ended, calls = measure("undisturbed", -1)
    assert ended == 0
    expected = comparable(folder / "undisturbed")
    assert len(expected) == 4
    assert not [record for record in expected if "error" in record]
    moments = random.Random(0)
    # One in each tenth of a run, so that no part of it is left out.
    for index in range(KILLS):
        moment = int((index + moments.random()) / KILLS * 0.98 * calls) + 1
        assert measure(f"run{index}", moment)[0] == -signal.SIGKILL
        assert measure(f"run{index}")[0] == 0
        assert comparable(folder / f"run{index}") == expected
        left = {path.name for part in ("records", "networks") for path in (folder / f"run{index}" / part).iterdir()}
        assert not [name for name in left if name.startswith(".")]


def alive(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(own) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(folder, comparable, monkeypatch, sent):
    (folder / "grid.yaml").write_text(GRID.replace("epochs: 2", "epochs: 100"))  # so that it is still at work then
    arguments = ["--import", "tests_network.py", "matrix", "run", "grid.yaml", "--output", "out", "--threads", "1"]
    command = [sys.executable, "-m", "bdfast", *arguments, "--quiet"]
    started = subprocess.Popen([*command, "--workers", "2"], cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list((folder / "out").glob("records/*.json")) and time.monotonic() < deadline:
            assert started.poll() is None
            time.sleep(0.01)
        started.send_signal(sent)
        assert started.wait() == (130 if sent == signal.SIGINT else -sent)
        while alive(started.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive(started.pid) == []
    finally:
        for process in alive(started.pid):
            os.kill(process, signal.SIGKILL)
    # What they have left is whole, and can be gone on with.
    monkeypatch.chdir(folder)
    assert run_grid(read_grid("grid.yaml"), "out", threads=1).failed == 0
    assert len(comparable(folder / "out")) == 4


LETHAL = """
import os
from dataclasses import dataclass
import bdfast

@bdfast.register("purify", "lethal")
@dataclass(frozen=True)
class Lethal(bdfast.defenses.Defense):
    '''Ends the process, as a system short of memory does.'''

    def run(self, model, clean, run):
        os._exit(9)
"""


@pytest.mark.slow
def test_a_worker_that_dies_fails_its_cell_only(folder, comparable, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "tests_network", None)  # goes again with the test
    (folder / "tests_network.py").write_text(NETWORK + LETHAL)
    (folder / "grid.yaml").write_text(GRID.replace("[none,", "[none, lethal,").replace("[badnets, none]", "[badnets]"))
    arguments = ["--import", "tests_network.py", "matrix", "run", "grid.yaml", "--output", "out", "--workers", "2"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "2 cells measured, 1 failed, 0 had a record." in capsys.readouterr().err
    failed = {record["defense"]["kind"]: record["error"] for record in comparable(folder / "out") if "error" in record}
    assert list(failed) == ["lethal"]
    assert failed["lethal"]["type"] == "BrokenProcessPool"
