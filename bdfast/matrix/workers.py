"""The processes of a run: none beside this one, or several that end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from bdfast.matrix.cells import Cell
from bdfast.matrix.images_by_name import DataFacts
from bdfast.matrix.measuring import Workshop
from bdfast.matrix.networks import Training

Setup = Callable[[], object]
Work = Training | Cell


@dataclass(frozen=True, eq=False)
class Crew:
    """Who works on a run.

    Attributes:
        output: Folder of the run.
        facts: Of the images, by name.
        workers: How many processes; 1 is this one.
        threads: Of each of them; None shares those that torch has here.
        setup: Called first in every other process: it may import code that registers methods. It must be picklable.
    """

    output: Path
    facts: dict[str, DataFacts]
    workers: int = 1
    threads: int | None = None
    setup: Setup | None = None

    @contextmanager
    def at_work(self) -> Iterator[Executor]:
        """An executor that takes `do` and a piece of work. When the block ends early, its processes are stopped."""
        threads = self.threads or max(1, torch.get_num_threads() // self.workers)
        if self.workers == 1:
            with _torch_threads(threads):
                yield Here(Workshop(self.output, self.facts))
            return
        spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA, nor the threads of torch
        stopped, stop = spawn.Pipe(duplex=False)
        numbers = spawn.SimpleQueue()
        for number in range(self.workers):
            numbers.put(number)
        arguments = (self.setup, self.output, self.facts, threads, stopped, numbers)
        pool = ProcessPoolExecutor(self.workers, mp_context=spawn, initializer=_start, initargs=arguments)
        try:
            yield pool
        except BaseException:
            stop.close()  # Ctrl-C: do not wait for cells that take an hour
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            stop.close()


class Here(Executor):
    """Does the work in this process, at once."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Returns a future that is done. An exception of the work goes into it; Ctrl-C does not."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, workshop=self._workshop, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


_workshops: list[Workshop] = []
"""The one of this process, where it is a worker."""


def do(work: Work, workshop: Workshop | None = None) -> Any:
    """Train a network, or measure a cell; returns what `Workshop.train` or `Workshop.measure` do."""
    shop = _workshops[0] if workshop is None else workshop
    return shop.train(work) if isinstance(work, Training) else shop.measure(work)


def _start(
    setup: Setup | None,
    output: Path,
    facts: dict[str, DataFacts],
    threads: int,
    stopped: connection.Connection,
    numbers: Any,
) -> None:
    """Make this process a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one decides
    threading.Thread(target=_end_with, args=(stopped,), daemon=True).start()
    torch.set_num_threads(threads)
    number = numbers.get()
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    if setup is not None:
        setup()
    _workshops.append(Workshop(output, facts))


def _end_with(stopped: connection.Connection) -> None:
    """The pipe closes when the run is stopped, and also when the process that started it is killed."""
    connection.wait([stopped])
    os._exit(1)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
