"""Watches a program from outside: takes its output up to the limit, and kills it at its limits."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from resource import struct_rusage

from millrace.environments.sandbox.run import Ending, Limits, Run, SandboxFault

STARTED = b"s"
"""What the box's own code writes right before the program begins."""

START_LIMIT_S = 30.0
"""How long a box may take to begin with the program."""
END_GRACE_S = 1.0

READ_BYTES = 1 << 16
SHORTEST_NAP_S, LONGEST_NAP_S = 0.0002, 0.005
CPU_TOLERANCE_S = 0.05
"""The kernel counts processor time in ticks."""


def collect(pid: int, stdout: int, stderr: int, started: int | None, limits: Limits) -> Run:
    """Wait for the child `pid`, which is killed at the limits, and take what it writes. Closes the descriptors. The
    time that the box takes before the program begins is not the program's, where `started` tells of it.

    Raises:
        SandboxFault: the program did not begin.
    """
    try:
        if started is not None:
            _await_start(pid, stderr, started)
        begin = time.monotonic()
        kept, ending = _take(stdout, stderr, begin + limits.wall_s, limits.output_bytes)
        gone = _reap(pid, begin + limits.wall_s if ending is None else 0.0)
        if gone is None:
            ending = ending or "wall"
            gone = _kill(pid)
        wall_s = time.monotonic() - begin
    finally:
        for descriptor in (stdout, stderr, *([] if started is None else [started])):
            os.close(descriptor)
    status, usage = gone
    code, cpu_s = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    if ending is None and code == -signal.SIGKILL and cpu_s >= limits.cpu_s - CPU_TOLERANCE_S:
        ending = "cpu"
    output = (bytes(kept[stdout]), bytes(kept[stderr]))
    return Run(ending or ("killed" if code < 0 else "exited"), abs(code), *output, cpu_s, wall_s, usage.ru_maxrss << 10)


def _await_start(pid: int, stderr: int, started: int) -> None:
    poll = select.poll()
    poll.register(started, select.POLLIN)
    if poll.poll(START_LIMIT_S * 1000) and os.read(started, 1) == STARTED:
        return
    gone = _reap(pid, time.monotonic() + END_GRACE_S) or _kill(pid)
    os.set_blocking(stderr, False)
    try:
        message = os.read(stderr, READ_BYTES).decode(errors="replace").strip()[-500:]
    except BlockingIOError:
        message = ""
    code = os.waitstatus_to_exitcode(gone[0])
    raise SandboxFault(f"the box ended (status {code}) before the program began: {message or 'no message'}")


def _kill(pid: int) -> tuple[int, struct_rusage]:
    os.kill(pid, signal.SIGKILL)  # a child that was not reaped: the number is its own
    return _reaped(pid)


def _reaped(pid: int) -> tuple[int, struct_rusage]:
    """Reap a child that has ended, or will at once, and end what it left behind in its group."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with suppress(ProcessLookupError, PermissionError):  # it ended before it had a group; it became another user
        os.killpg(pid, signal.SIGKILL)
    return os.wait4(pid, 0)[1:]


def _take(stdout: int, stderr: int, deadline: float, most: int) -> tuple[dict[int, bytearray], Ending | None]:
    """Output of both streams until both close, or until a limit, which is then named."""
    kept = {stdout: bytearray(), stderr: bytearray()}
    poll = select.poll()
    for descriptor in kept:
        poll.register(descriptor, select.POLLIN)
    open_streams = len(kept)
    while open_streams:
        left = deadline - time.monotonic()
        if left <= 0:
            return kept, "wall"
        for descriptor, _ in poll.poll(left * 1000):
            piece = os.read(descriptor, READ_BYTES)
            kept[descriptor] += piece
            if len(kept[descriptor]) > most:
                return kept, "output"
            if not piece:
                poll.unregister(descriptor)
                open_streams -= 1
    return kept, None


def _reap(pid: int, deadline: float) -> tuple[int, struct_rusage] | None:
    """Status and usage of a child that has closed its output; None when it lives on at the deadline."""
    nap = SHORTEST_NAP_S
    while True:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            return _reaped(pid)
        if time.monotonic() >= deadline:
            return None
        time.sleep(nap)
        nap = min(2 * nap, LONGEST_NAP_S)
