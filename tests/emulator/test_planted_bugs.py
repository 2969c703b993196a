"""The emulator and the sanitizers catch what they are there for: a correct kernel passes, each planted bug does not."""

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from emulated import ADDRESS_SANITIZER, HERE, ORDERS, THREAD_SANITIZER, compile_with_emulator

RIGHT, REPORTED = 0, 86
# By the numbers in bugs.cpp: what shows each bug.
BUGS = {
    "missing barrier": (1, "wrong", "tsan"),
    "divergent barrier": (2, "reported"),
    "vector beyond the end": (3, "asan"),
    "misaligned vector": (4, "asan"),
    "shared memory overwritten too early": (5, "wrong", "tsan"),
    "global sum by several blocks": (6, "tsan between blocks"),
    "shared memory never written": (7, "wrong"),
    "shuffle from lanes that have left": (8, "reported"),
    "lanes in different shuffles": (9, "reported"),
    "wrong row offset": (10, "wrong"),
    "index of 32 bits": (11, "asan"),
    "blocks that write the same element": (12, "wrong", "tsan between blocks"),
}


# All of them use what one fixture compiles.
pytestmark = pytest.mark.xdist_group("planted bugs")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bugs")
    flags = {"plain": (), "asan": ADDRESS_SANITIZER, "tsan": THREAD_SANITIZER}

    def build(name):
        compile_with_emulator(HERE / "bugs.cpp", folder / name, *flags[name], tsan=name == "tsan", kernels=False)
        return name, folder / name

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, flags))


def run(program, bug, order=0, os_threads=1):
    command = [program, str(bug), str(order), str(os_threads)]
    return subprocess.run(command, capture_output=True, text=True)


def findings(programs, bug):
    """Everything that shows this bug."""
    found = set()
    for order in range(len(ORDERS)):
        ran = run(programs["plain"], bug, order)
        if ran.returncode == REPORTED:
            found.add("reported")
        elif ran.stdout.strip() != "right":
            found.add("wrong")
    if "reported" in found:
        return found
    if "ERROR: AddressSanitizer" in (error := run(programs["asan"], bug).stderr) or "runtime error:" in error:
        found.add("asan")
    if "data race" in run(programs["tsan"], bug).stderr:
        found.add("tsan")
    if "data race" in run(programs["tsan"], bug, os_threads=5).stderr:
        found.add("tsan between blocks")
    return found


def test_a_correct_kernel_passes_everything(programs):
    assert findings(programs, 0) == set()


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(programs, bug):
    number, *expected = BUGS[bug]
    assert set(expected) <= findings(programs, number)
