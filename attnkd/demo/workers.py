"""Independent pieces of work in several processes, one thread each. What comes out does not depend on the number of processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

Run = Callable[[Callable[..., Any], Sequence[tuple]], list]
"""run(method, calls) is [method(work, *args) for args in calls]."""

MOST = 4
"""Processes at a time unless more are asked for: each imports PyTorch and keeps its own copy of the data."""


def usual_jobs(device: torch.device) -> int:
    """As many as PyTorch would use threads (it knows the cores, and OMP_NUM_THREADS); one where they would share a GPU."""
    return min(torch.get_num_threads(), MOST) if device.type == "cpu" else 1


@contextmanager
def workers(make: Callable[[Callable[[Any], None]], Any], jobs: int, say: Callable[[Any], None]) -> Iterator[Run]:
    """Processes that each make their own ``work = make(say)``; they end with the block, and with this process.

    Args:
        make: whatever is pickled: a class, or a partial of one.
        jobs: processes; 1 does everything in this one.
        say: what the work says arrives here, in this process and thread.
    """
    if jobs == 1:
        work = make(say)
        with one_thread():
            yield lambda method, calls: [method(work, *args) for args in calls]
        return
    # A fork of a process that has used autograd cannot use it.
    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    theirs, ours = context.Pipe(duplex=False)

    def run(method: Callable[..., Any], calls: Sequence[tuple]) -> list:
        futures = [executor.submit(_call, method, args) for args in calls]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            while not said.empty():
                say(said.get())
            for future in done:
                future.result()  # an error ends the block, and with it all others
        return [future.result() for future in futures]

    with ProcessPoolExecutor(jobs, context, _begin, (make, said.put, theirs)) as executor:
        try:
            yield run
        except BaseException:
            ours.close()
            raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are rounded in the order of one thread while open, on every machine alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_work: Any = None


def _begin(make: Callable[..., Any], say: Callable[[Any], None], told: Connection) -> None:
    global _work
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one decides
    threading.Thread(target=_end_when, args=(told,), daemon=True).start()
    _work = make(say)


def _end_when(told: Connection) -> None:
    """The other end is in the first process alone: it is closed there, or the process has ended."""
    with contextlib.suppress(EOFError):
        told.recv()
    os._exit(1)


def _call(method: Callable[..., Any], args: tuple) -> Any:
    return method(_work, *args)
