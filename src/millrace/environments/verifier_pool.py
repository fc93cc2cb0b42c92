"""Verifiers in processes that can be killed.

A verifier runs code that was not written for hostile input: it may hang where no exception and no signal handler of
Python reaches it, eat memory, or crash. So each runs in a process of its own that is killed at its time limit and
replaced.

Each of the pool's threads owns one process and speaks with it through pipes, so the pool belongs to no event loop and a
wait costs the loop nothing. Imports no torch, and the workers do not either.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from millrace.errors import MillraceError

MEMORY_BYTES = 2 << 30
"""Address space of one worker."""

START_LIMIT_S = 120.0
"""How long a worker may take to import its verifier; not counted against an item."""

EXIT_GRACE_S = 1.0
"""How long a worker that closed its pipes may take to be gone."""


@dataclass(frozen=True)
class Verdict:
    outcome: Literal["done", "timeout", "crash"]
    result: Any = None
    """What the verifier returned, when it is done."""
    reason: str = ""
    """Why there is no result."""


@dataclass
class PoolCounts:
    """What happened in the pool so far."""

    done: int = 0
    timeouts: int = 0
    crashes: int = 0
    starts: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, name: str) -> None:
        with self.lock:
            setattr(self, name, getattr(self, name) + 1)


class VerifierStartError(MillraceError):
    """A worker could not be started: the verifier's module cannot be imported, or there is no room for a process."""


class VerifierPool:
    """`workers` processes that run `verifier` ("module:function"; JSON values in, a JSON value out)."""

    def __init__(self, verifier: str, *, workers: int, limit_s: float, memory_bytes: int = MEMORY_BYTES) -> None:
        self.limit_s = limit_s
        self.counts = PoolCounts()
        self._workers = [_Worker(verifier, memory_bytes, self.counts) for _ in range(workers)]
        self._idle = list(self._workers)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")

    async def verify(self, *arguments: Any, limit_s: float | None = None) -> Verdict:
        """Run the verifier on one item; waits for a free worker, and from then at most `limit_s` (the pool's own when
        absent).

        Raises:
            VerifierStartError: no worker can be started.
        """
        return await asyncio.wrap_future(self._threads.submit(self._verify, arguments, limit_s or self.limit_s))

    async def verify_all(self, items: Sequence[Sequence[Any]]) -> list[Verdict]:
        """Verdicts in the order of the items."""
        return list(await asyncio.gather(*(self.verify(*item) for item in items)))

    @property
    def pids(self) -> list[int]:
        """The processes that are alive now."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    async def close(self) -> None:
        """Kill every worker, also one in the middle of an item, and wait until all are gone."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.retire()
        await asyncio.to_thread(self._threads.shutdown)
        for worker in self._workers:
            worker.end(grace_s=0.0)

    def _verify(self, arguments: Sequence[Any], limit_s: float) -> Verdict:
        worker = self._idle.pop()  # as many threads as workers: one is always free
        try:
            return worker.verify(arguments, limit_s)
        finally:
            self._idle.append(worker)


class _Worker:
    """One process at a time, used by one thread at a time; any thread may retire it."""

    def __init__(self, verifier: str, memory_bytes: int, counts: PoolCounts) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._arguments = ["-m", "millrace.environments.verifier_worker", verifier, str(memory_bytes)]
        self._counts = counts
        self._retired = False
        self._lock = threading.Lock()

    def verify(self, arguments: Sequence[Any], limit_s: float) -> Verdict:
        request = json.dumps({"arguments": arguments, "limit_s": limit_s}).encode() + b"\n"
        try:
            process = self._running()
            reply = _exchange(process, request, time.monotonic() + limit_s)
        except TimeoutError:
            self.end(grace_s=0.0)
            self._counts.add("timeouts")
            return Verdict("timeout", reason="timeout")
        except _WorkerGoneError:
            status = self.end(grace_s=EXIT_GRACE_S)
            if self._retired:
                return Verdict("crash", reason="verifier pool closed")
            self._counts.add("crashes")
            return Verdict("crash", reason=f"verifier crashed ({_describe(status)})")
        self._counts.add("done")
        return Verdict("done", json.loads(reply))

    def retire(self) -> None:
        """Start no further process, and kill the one there is; whoever waits for it sees it gone."""
        with self._lock:
            self._retired = True
            if self.process is not None:
                self.process.kill()

    def end(self, grace_s: float) -> int:
        """Give the process a moment to end by itself (for its own exit status), kill it, reap it; its exit status."""
        process, self.process = self.process, None
        if process is None:
            return 0
        try:
            status = process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            # what a full pipe did not take is of no interest any more
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        return status

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, started if there is none."""
        if self.process is not None:
            return self.process
        with self._lock:
            if self._retired:
                raise _WorkerGoneError
            self.process = process = self._start()
        self._counts.add("starts")
        try:
            _exchange(process, b"", time.monotonic() + START_LIMIT_S)
        except (TimeoutError, _WorkerGoneError) as error:
            if self._retired:
                raise
            status = self.end(grace_s=EXIT_GRACE_S)
            raise VerifierStartError(
                f"the verifier {self._arguments[2]} does not start ({_describe(status)}); to see why, run: "
                f"{' '.join([sys.executable, *self._arguments])} </dev/null"
            ) from error
        return process

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                [sys.executable, *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C goes to the owner, which then ends its workers in order
            )
        except OSError as error:
            raise VerifierStartError(
                f"no process can be started for the verifier {self._arguments[2]} ({error}); see that this machine has "
                "memory, processes and open files left"
            ) from error


class _WorkerGoneError(Exception):
    """The process closed its pipes."""


def _exchange(process: subprocess.Popen[bytes], request: bytes, deadline: float) -> bytes:
    """Send a request and read one line of reply, neither beyond the deadline."""
    assert process.stdin is not None and process.stdout is not None
    inbox, outbox = process.stdout.fileno(), process.stdin.fileno()
    os.set_blocking(outbox, False)
    poll = select.poll()
    poll.register(inbox, select.POLLIN)
    poll.register(outbox, select.POLLOUT)
    reply = b""
    while not reply.endswith(b"\n"):
        if not request:
            poll.modify(outbox, 0)
        remaining = deadline - time.monotonic()
        ready = poll.poll(max(0.0, remaining * 1000))
        if not ready or remaining <= 0:
            raise TimeoutError
        try:
            for descriptor, _ in ready:
                if descriptor == inbox:
                    reply += _read_some(inbox)
                elif request:
                    request = request[os.write(outbox, request) :]
        except BrokenPipeError:
            raise _WorkerGoneError from None
    return reply


def _read_some(inbox: int) -> bytes:
    piece = os.read(inbox, 1 << 16)
    if not piece:
        raise _WorkerGoneError
    return piece


def _describe(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    return f"signal {signal.Signals(-status).name}"
