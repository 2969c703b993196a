"""All CUDA kernels under the sanitizers, and the same bits in every order of threads."""

import subprocess

from emulated import ADDRESS_SANITIZER, HERE, ORDERS, THREAD_SANITIZER, compile_with_emulator

RUNS = [(order, os_threads) for order in range(len(ORDERS)) for os_threads in (1, 3)]


def checksum(program, order, os_threads, dtypes=3):
    ran = subprocess.run([program, str(order), str(os_threads), str(dtypes)], capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    assert ran.stderr == ""
    return ran.stdout


def test_the_same_bits_in_every_order(tmp_path):
    compile_with_emulator(HERE / "driver.cpp", tmp_path / "driver")
    assert len({checksum(tmp_path / "driver", *run) for run in RUNS}) == 1


def test_address_and_undefined_behaviour(tmp_path):
    compile_with_emulator(HERE / "driver.cpp", tmp_path / "driver", *ADDRESS_SANITIZER)
    checksum(tmp_path / "driver", 0, 1)


def test_races(tmp_path):
    """Between the threads of a block, and between blocks."""
    compile_with_emulator(HERE / "driver.cpp", tmp_path / "driver", *THREAD_SANITIZER, tsan=True)
    checksum(tmp_path / "driver", order=2, os_threads=3, dtypes=1)
