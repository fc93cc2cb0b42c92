"""Processes that a test may not leave behind."""

import contextlib
import ctypes
import os
import signal
import time

import psutil

PR_SET_CHILD_SUBREAPER = 36
ORPHAN_LIMIT_S = 10.0


class no_process_left:
    """Whoever loses its parent comes to this process, and must have ended by itself."""

    def __enter__(self):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.before = set(psutil.Process().children(recursive=True))

    def __exit__(self, kind, error, trace):
        deadline = time.monotonic() + ORPHAN_LIMIT_S
        while left := [p for p in psutil.Process().children(recursive=True) if p not in self.before]:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
                    if process.status() == psutil.STATUS_ZOMBIE and process.ppid() == os.getpid():
                        os.waitpid(process.pid, 0)
            if time.monotonic() > deadline:
                for process in left:
                    process.send_signal(signal.SIGKILL)
                raise AssertionError(f"left behind: {left}")
            time.sleep(0.02)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
