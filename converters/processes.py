"""Jobs on several processes, with one count of bytes, that end together: at a failure, at Ctrl-C, and when their parent
is killed.

Each process holds one job's tensors at a time and nothing of Megatron-Core. What it frees it keeps, so that the next
tensor finds memory that is mapped already, which is worth more than the copies that are saved elsewhere.

All are forked from one server, which imports torch and the jobs once; `start_server` lets it do so early.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from millrace.converters.errors import ConversionError
from millrace.processes import deaf_to_interrupts, end_with_parent

Job = TypeVar("Job")
Result = TypeVar("Result")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's mallopt
_KEPT_BYTES = 1 << 30
_POLL_SECONDS = 0.2

_CONTEXT = multiprocessing.get_context("forkserver")
_JOBS = "millrace.converters.streaming"
"""The module of the jobs, which every process needs."""

_shared: Any = None
"""In a worker: the counter of bytes, and the flag that says stop."""


class Stopped(Exception):
    """Another process failed, or the user pressed Ctrl-C."""


def start_server() -> None:
    """Start the process that all others are forked from. Nobody waits for what it imports."""
    _CONTEXT.set_forkserver_preload([_JOBS])
    with deaf_to_interrupts():
        multiprocessing.forkserver.ensure_running()


def default_processes() -> int:
    """One for each core this process may use, eight at most: disks are not faster with more."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def advance(count: int) -> None:
    """Count bytes that a job of this process has written. Raises Stopped when the jobs are to end."""
    counter, stop = _shared
    if stop.is_set():
        raise Stopped
    with counter.get_lock():
        counter.value += count


class Workers:
    """Processes that do jobs. They start with the block, which may do something else until it has jobs for them."""

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def __enter__(self) -> Workers:
        start_server()
        self._counter, self._stop = shared = (_CONTEXT.Value("q", 0), _CONTEXT.Event())
        self._pool = ProcessPoolExecutor(self.processes, mp_context=_CONTEXT, initializer=_start, initargs=shared)
        self._threads = ThreadPoolExecutor(self.processes)
        with deaf_to_interrupts():
            for _ in range(self.processes):
                self._pool.submit(importlib.import_module, _JOBS)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._threads.shutdown(wait=True)

    def run(
        self,
        work: Callable[[Job], Result],
        jobs: Iterable[Job],
        progress: Callable[[int], None],
        settle: Callable[[Job, Result], None],
    ) -> None:
        """Do every job; `progress` is told the bytes that were counted since the last call. What waits for the disk is
        left to `settle`, which threads of this process call with what a job returned, so that the processes go on.

        The first error is raised. Raises ConversionError when a process is killed, as by a system without memory.
        """
        told = 0
        try:
            with deaf_to_interrupts():
                working = {self._pool.submit(work, job): job for job in jobs}
            waiting: set[Future[Any]] = set(working)
            while waiting:
                ended, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                counted = self._counter.value
                progress(counted - told)
                told = counted
                for future in ended:
                    result = future.result()
                    if future in working:
                        waiting.add(self._threads.submit(settle, working[future], result))
        except BrokenProcessPool:
            raise ConversionError(
                "a process that was writing was killed, by the system when memory runs out; the same command goes on, "
                "with --processes 1 in the least memory"
            ) from None


@contextmanager
def alone(work: Callable[..., Result], *arguments: Any) -> Iterator[Future[Result]]:
    """Calls a function in a process of its own, which leaves nothing behind; the block may do something else until it
    needs what is returned."""
    with ProcessPoolExecutor(1, mp_context=_CONTEXT, initializer=_start, initargs=(None, None)) as pool:
        with deaf_to_interrupts():
            future = pool.submit(work, *arguments)
        yield future


def _start(counter: Any, stop: Any) -> None:
    """What each process does first."""
    global _shared
    _shared = (counter, stop)
    end_with_parent()
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Pages that go back to the system come again zeroed, one fault each: slower than any copy made here."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
