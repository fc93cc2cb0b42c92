"""Runs a command so that nothing of it outlives the trainer or itself: `python -m ... PARENT_PID COMMAND...`.

An engine is several processes. This one starts them in its own process group and ends the whole group when the trainer
dies (however it dies), when the command's first process ends, or when it is told to by SIGTERM. Standard library only:
it stays in memory as long as the engine lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SOCKETS_VARIABLE = "VLLM_RPC_BASE_PATH"
"""Where vLLM puts the sockets between its processes; those that are killed leave them there."""
GRACE_SECONDS = 5.0
"""How long the group may take to end by itself after SIGTERM."""


def main(parent: int, command: list[str]) -> int:
    """Exit status of the command; 128 + signal number when a signal ended it."""
    _follow_parent(parent)
    # A scheduler's warning reaches every process of its job and would end those that do not know it. The command
    # inherits this; what is to be done about the warning is for the trainer to say.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    terminated = False

    def pass_on(signum: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True

    signal.signal(signal.SIGTERM, pass_on)
    with tempfile.TemporaryDirectory(prefix="millrace-") as sockets:
        # This process has one thread, so code between fork and exec is safe here.
        child = subprocess.Popen(
            command,
            env={**os.environ, SOCKETS_VARIABLE: sockets},
            preexec_fn=lambda: _signal_on_parent_death(signal.SIGKILL),
        )
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the trainer, which stops its engines in order
        while child.poll() is None and not terminated:
            time.sleep(0.05)
        _end_group(child)
        status = child.wait()
    return 128 - status if status < 0 else status


def _follow_parent(parent: int) -> None:
    # The kernel sends the signal when the thread that started this process ends, so the trainer starts engines from a
    # thread that lives as long as the fleet.
    _signal_on_parent_death(signal.SIGTERM)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


def _signal_on_parent_death(signum: signal.Signals) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0)


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the command, which ends its own children in order; SIGKILL to what is left after a grace period."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Where the command itself is gone, nobody is left to end the others in order.
    limit = time.monotonic() + (GRACE_SECONDS if child.poll() is None else 0.0)
    child.terminate()
    while _others_left(child) and time.monotonic() < limit:
        time.sleep(0.05)
    for pid in _descendants():
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.kill(pid, signal.SIGKILL)
    child.wait()
    limit = time.monotonic() + GRACE_SECONDS
    while _descendants() and time.monotonic() < limit:  # a killed process ends when its turn on a core comes
        time.sleep(0.01)


def _others_left(child: subprocess.Popen[bytes]) -> bool:
    child.poll()
    return bool(_descendants())


def _descendants() -> list[int]:
    """Processes of this group besides this one that still run (a zombie is none)."""
    own = os.getpid()
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == own:
            continue
        try:
            with open(f"/proc/{entry.name}/stat", "rb") as file:
                state, _, group = file.read().rpartition(b")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
        if int(group) == own and state != b"Z":
            found.append(int(entry.name))
    return found


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
