"""Where the time of every op goes on a GPU: `python -m bench.gpu_times` shows device and host time apart.

`python -m bench` times calls one by one, with the wait for their end. A training step does not wait: there an op costs
the larger of its time on the device and of its time on the host. Nothing is compiled, so that it takes seconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from bdfast.ops.backends import use_backend
from bench import lists, test_ops
from bench.compare import OURS

ROUNDS = 15
# Clock cycles for which the GPU waits before the timed call, so that the host is far ahead of it.
ASLEEP = 20_000_000


def device_seconds(way: Callable[[], object]) -> float:
    """The median time between two events around a call that was enqueued while the GPU slept."""
    times = []
    for _ in range(ROUNDS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(ASLEEP)
        before.record()
        way()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) / 1e3)
    return statistics.median(times)


def host_seconds(way: Callable[[], object]) -> float:
    """The median time until a call returns while the GPU sleeps."""
    times = []
    for _ in range(ROUNDS):
        torch.cuda._sleep(ASLEEP)
        start = time.perf_counter()
        way()
        times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return statistics.median(times)


def copied_per_second() -> float:
    """Bytes that a copy on the device reads and writes per second."""
    to, source = (torch.ones(1 << 28, device="cuda") for _ in range(2))
    return 2 * source.nbytes / device_seconds(lambda: to.copy_(source))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_times", description=__doc__)
    parser.add_argument("cases", nargs="*", default=["ResNet-18", "ViT-L/16"], help="networks of bench.lists")
    parser.add_argument("--backend", nargs="+", default=["cuda", "triton", "foreach"], help="what to time")
    arguments = parser.parse_args()
    bandwidth = copied_per_second()
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy moves {bandwidth / 1e12:.2f} TB/s"
    table = Table("op", "case", "backend", "device us", "host us", "TB/s", "of a copy", title=title)
    for op in test_ops.OPS:
        for case in arguments.cases:
            made = op(case)
            moved = made.bytes_each * lists.elements(case)
            for name in arguments.backend:
                way = made.ways["foreach" if name == "foreach" else OURS]
                with use_backend("torch" if name == "foreach" else name):
                    way()
                    on_device, on_host = device_seconds(way), host_seconds(way)
                speed = moved / on_device
                figures = (f"{on_device * 1e6:.0f}", f"{on_host * 1e6:.0f}", f"{speed / 1e12:.2f}")
                table.add_row(op.__name__, case, name, *figures, f"{speed / bandwidth:.0%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
