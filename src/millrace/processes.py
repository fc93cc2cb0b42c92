"""Processes of `multiprocessing` that leave signals to their parent and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait

_UNHEARD = {signal.SIGINT, signal.SIGUSR1}


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started here never hear Ctrl-C or a scheduler's warning: their parent does, and stops them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _UNHEARD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """In a process: end it when its parent is gone, whatever it does then."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
