"""The tests of the ops once more, with the CUDA kernels in the place of the native ones."""

from emulated import HERE

KERNELS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from emulated import Emulated
emulated = Emulated(Path(sys.argv[2]))
emulated.set("random")
kernels = emulated.kernels()
"""


def test_the_tests_of_the_ops(emulated, run_op_tests):
    run_op_tests(KERNELS, str(HERE), str(emulated.path))
