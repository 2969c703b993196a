import getpass
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from bdfast.ops.backends import ORDER, backends, use_backend

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER:
    # Several threads of several workers on the same cores are slower than one each.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Inductor's cache takes no notice of ATEN_CPU_CAPABILITY (torch 2.14.1): code for AVX-512 that it finds there gives
# wrong numbers where AVX2 is asked for.
INDUCTOR_CACHE = f"bdfast-inductor-{getpass.getuser()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / INDUCTOR_CACHE))

# What must not be missing: backends, "cuda-build", "emulator", "gpu". Set where they are known to be there.
REQUIRED = os.environ.get("BDFAST_REQUIRE", "").replace(",", " ").split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first: the short ones then fill up whichever worker is free."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if WORKER else own


@pytest.fixture
def uncounted() -> Iterator[None]:
    """Coverage does not count the lines of this test: that takes as long again as the test.

    pytest-cov's `no_cover` does nothing in a worker of pytest-xdist, where pytest-cov 7.1 starts coverage twice.
    """
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


@pytest.fixture(scope="session")
def skip_without() -> Callable[[str, str | None], None]:
    """Skips the test for a reason, if there is one; fails it where that thing is required."""

    def skip(name: str, reason: str | None) -> None:
        if reason:
            report = pytest.fail if name in REQUIRED else pytest.skip
            report(f"{name}: {reason}")

    return skip


OP_TESTS = (
    "neuron_norms",
    "kth_largest_change",
    "zero_changed",
    "scale_neurons",
    "perturb",
    "sharp_step",
    "multi_tensor",
    "streaming",
)
# Too few selected sub-weights are an error on the CPU, and NaN on a GPU, which is not kept waiting to tell.
LEFT_OUT = "not out_of_range and not nothing_selected"
IN_PLACE_OF_CPU = """
from bdfast.ops import backends
backends._LOADERS["cpu"] = lambda: kernels
backends._load.cache_clear()
import pytest, sys
sys.exit(pytest.main(sys.argv[sys.argv.index("--") + 1 :]))
"""


@pytest.fixture
def run_op_tests() -> Callable[..., None]:
    """Runs the tests of the ops with other kernels for the CPU: those that this Python leaves in `kernels`."""

    def run(python: str, *args: str) -> None:
        tests = Path(__file__).parent
        files = [str(tests / "ops" / f"test_{name}.py") for name in OP_TESTS]
        options = ["-q", "-x", "-k", f"cpu and {LEFT_OUT}", "-p", "no:cacheprovider"]
        command = [sys.executable, "-c", python + IN_PLACE_OF_CPU, *args, "--", *options, *files]
        ran = subprocess.run(command, cwd=tests.parent, capture_output=True, text=True)
        assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
        assert " passed" in ran.stdout

    return run


@pytest.fixture(params=ORDER["cpu"])
def backend(request: pytest.FixtureRequest, skip_without: Callable) -> Iterator[str]:
    """Runs the test under every backend for CPU tensors."""
    skip_without(request.param, backends()[request.param].reason)
    with use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def digits():
    """Attacker's and defender's images, and the test set."""
    from bdfast.data.digits import digits_source

    source = digits_source()
    training, test = source.train, source.test
    clean = torch.arange(len(training)) % 4 == 0
    return training.subset(~clean), training.subset(clean), test


@pytest.fixture(scope="session")
def backdoored(digits, shared_folder):
    """A small network with a working backdoor, and what it does; one worker trains it."""
    import bdfast
    from bdfast.io import load_into, save_weights
    from bdfast.models import PreActResNet18
    from bdfast.training import fit
    from bdfast.training.seeds import seeded

    attacker, _, test = digits
    attack = bdfast.BadNets(size=2)
    with seeded(0, torch.device("cpu")):
        model = PreActResNet18(10, width=8, in_channels=1)
    weights = shared_folder / "backdoored.safetensors"
    with FileLock(shared_folder / "backdoored.lock"):
        if weights.exists():
            load_into(model, weights)
        else:
            fit(model, bdfast.poisoned(attacker, attack), epochs=10, batch_size=64, amp=False)
            save_weights(model, weights)
    judge = bdfast.Evaluator(test, bdfast.Triggered(test, attack))
    before = judge(model)
    assert before.acc > 0.9
    assert before.asr > 0.95
    return model.eval(), judge, before
